// Noise for whole tensors: a table of functions for each instruction set, and functions that use the selected one on
// several threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "noise/noise.h"

namespace correctnet {

struct NoiseKernels {
  void (*factors)(const Noise&, int64_t first, int64_t count, float* out);
  // Rows first_row ... last_row - 1; `scratch` is for 2 * taps * channels floats. The arrays and `out` begin at row 0;
  // noise that is no factor needs a weight whose memory is in the order of elements.
  void (*noisy_float32)(const Noise&, const WeightShape&, int64_t first_row, int64_t last_row, const Nominal&,
                        float* out, float* scratch);
  void (*noisy_bfloat16)(const Noise&, const WeightShape&, int64_t first_row, int64_t last_row, const Nominal&,
                         uint16_t* out, float* scratch);
};

extern const NoiseKernels noise_portable;
#if defined(CORRECTNET_X86)
extern const NoiseKernels noise_avx2, noise_avx512, noise_avx512bf16;
#endif

const NoiseKernels& noise_kernels(Isa isa);

// out[i] = factor of element first + i
void lognormal(const Noise& noise, int64_t first, int64_t count, float* out, int threads);

// The weights of a chip, rounded to bfloat16 if T is uint16_t. `nominal.row` is ignored.
template <class T>
void noisy_weight(const Noise& noise, const WeightShape& shape, Nominal nominal, T* out, int threads);

}  // namespace correctnet
