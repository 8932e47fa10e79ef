// Tables of the functions in noise_fill.h, one for each instruction set that noise_cases.cpp is compiled for.
#pragma once

#include <cstdint>

#include "noise/noise.h"

namespace correctnet {

struct NoiseCases {
  int step;  // number of words that `words` returns at a time
  void (*words)(const Noise&, uint32_t block, uint32_t* out);                      // of blocks block, block + 1, ...
  void (*normal)(const uint32_t* words, int64_t count, float* out);                // count: a multiple of 16
  void (*exp2)(const float* x, int64_t count, float* out);                         // likewise
  void (*fill_float32)(const float* weight, int64_t first, int64_t count, const Noise&, float* out);
  void (*fill_bfloat16)(const float* weight, int64_t first, int64_t count, const Noise&, uint16_t* out);
  void (*draw_float32)(const Nominal&, int64_t first, int64_t count, const Noise&, float* out);
  void (*draw_bfloat16)(const Nominal&, int64_t first, int64_t count, const Noise&, uint16_t* out);
};

extern const NoiseCases noise_cases_portable;
#if defined(CORRECTNET_X86)
extern const NoiseCases noise_cases_avx2, noise_cases_avx512, noise_cases_avx512bf16;
#endif

}  // namespace correctnet
