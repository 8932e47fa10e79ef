// Defines the table of noise_kernels.h for the instruction set that the including file is compiled for.
#pragma once

#include "cpu/noise_kernels.h"
#include "noise/noise_fill.h"

namespace correctnet {
namespace {

void factors(const Noise& noise, int64_t first, int64_t count, float* out) {
  noise_fill(nullptr, first, count, noise, out);
}

template <class T>
void multiply(const float* weight, const float* factor, int64_t count, T* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (constexpr int kHalf = noise::kVector; i + 2 * kHalf <= count; i += 2 * kHalf)
    noise::store(out + i, noise::multiply(noise::load(weight + i), noise::load(factor + i)),
                 noise::multiply(noise::load(weight + i + kHalf), noise::load(factor + i + kHalf)));
#endif
  for (; i < count; ++i) noise::store(out + i, noise::multiply(weight[i], factor[i]));
}

template <class T>
void noisy(const Noise& noise, const WeightShape& shape, int64_t first_row, int64_t last_row, const Nominal& nominal,
           T* out, float* scratch) {
  const int64_t taps = shape.taps, channels = shape.channels, size = taps * channels;
  if (shape.channels_last || taps == 1 || channels == 1)
    return noise_fill(nominal, first_row * size, (last_row - first_row) * size, noise, out + first_row * size);
  float* in_memory_order = scratch + size;
  for (int64_t row = first_row; row < last_row; ++row) {
    noise_fill(nullptr, row * size, size, noise, scratch);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) in_memory_order[c * taps + t] = scratch[t * channels + c];
    multiply(nominal.weight + row * size, in_memory_order, size, out + row * size);
  }
}

constexpr NoiseKernels noise_kernels_here() { return {factors, noisy<float>, noisy<uint16_t>}; }

}  // namespace
}  // namespace correctnet
