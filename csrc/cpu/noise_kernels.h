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
  // Rows first_row ... last_row - 1; `scratch` is for 2 * taps * channels floats. `weight` and `out` begin at row 0.
  void (*noisy_float32)(const Noise&, const WeightShape&, int64_t first_row, int64_t last_row, const float* weight,
                        float* out, float* scratch);
  void (*noisy_bfloat16)(const Noise&, const WeightShape&, int64_t first_row, int64_t last_row, const float* weight,
                         uint16_t* out, float* scratch);
};

extern const NoiseKernels noise_portable;
#if defined(CORRECTNET_X86)
extern const NoiseKernels noise_avx2, noise_avx512, noise_avx512bf16;
#endif

const NoiseKernels& noise_kernels(Isa isa);

// out[i] = factor of element first + i
void lognormal(const Noise& noise, int64_t first, int64_t count, float* out, int threads);

// out = weight * factor, rounded to bfloat16 if T is uint16_t
template <class T>
void noisy_weight(const Noise& noise, const WeightShape& shape, const float* weight, T* out, int threads);

}  // namespace correctnet
