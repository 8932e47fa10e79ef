// The table of noise_kernels.h for the instruction set that the including file is compiled for.
#pragma once

#include "noise_fill.h"
#include "noise_kernels.h"

namespace correctnet {
namespace {

void factors(const Noise& noise, int64_t first, int64_t count, float* out) {
  noise_fill(nullptr, first, count, noise, out);
}

inline float multiply_as(float weight, float factor, float*) { return noise::multiply(weight, factor); }
inline uint16_t multiply_as(float weight, float factor, uint16_t*) {
  return noise::bfloat16(noise::multiply(weight, factor));
}

template <class T>
void noisy(const Noise& noise, const Layer& layer, int64_t first_row, int64_t last_row, const float* weight, T* out,
           float* scratch) {
  const int64_t taps = layer.taps, channels = layer.channels, size = taps * channels;
  if (layer.channels_last || taps == 1 || channels == 1)
    return noise_fill(weight, first_row * size, (last_row - first_row) * size, noise, out + first_row * size);
  for (int64_t row = first_row; row < last_row; ++row) {
    noise_fill(nullptr, row * size, size, noise, scratch);
    const float* w = weight + row * size;
    T* o = out + row * size;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t, ++w, ++o) *o = multiply_as(*w, scratch[t * channels + c], o);
  }
}

constexpr NoiseKernels noise_kernels_here() { return {factors, noisy<float>, noisy<uint16_t>}; }

}  // namespace
}  // namespace correctnet
