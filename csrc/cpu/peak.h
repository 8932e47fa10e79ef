// Peak floating-point throughput of a core: multiply-adds on as many independent sums as registers hold, without memory
// access. No kernel can be faster, so `correctnet bench` relates the engine's throughput to it. Internal linkage.
#pragma once

#include "cpu/lanes.h"

namespace correctnet {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
using Register = __m512;
constexpr int kPeakSums = 24;  // of 32 registers, as in the tile of lanes.h
CN_INLINE Register multiply_add(Float, Register sum, Register x, Register w) { return _mm512_fmadd_ps(sum, x, w); }
#elif defined(__AVX2__) && defined(__FMA__)
using Register = __m256;
constexpr int kPeakSums = 12;  // of 16 registers
CN_INLINE Register multiply_add(Float, Register sum, Register x, Register w) { return _mm256_fmadd_ps(sum, x, w); }
#else
typedef float Register __attribute__((vector_size(16)));
constexpr int kPeakSums = 12;  // of 16 registers
CN_INLINE Register multiply_add(Float, Register sum, Register x, Register w) { return sum * x + w; }
#endif

#if defined(__AVX512BF16__)
CN_INLINE Register multiply_add(Bfloat16, Register sum, Register x, Register w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}
#else  // bfloat16 is multiplied as float32
CN_INLINE Register multiply_add(Bfloat16, Register sum, Register x, Register w) {
  return multiply_add(Float{}, sum, x, w);
}
#endif

// Executes kPeakSums multiply-adds `repetitions` times and returns the number of floating-point operations. Inputs are
// read from and results written to a volatile float, lane by lane, so that the compiler can neither merge nor drop a
// sum.
template <class Math>
double peak(int64_t repetitions) {
  constexpr int kFloats = sizeof(Register) / sizeof(float);
  volatile float outside = 1;
  Register x, w, sum[kPeakSums];
  for (int i = 0; i < kFloats; ++i) {
    x[i] = outside;
    w[i] = outside;
#pragma GCC unroll 24
    for (int k = 0; k < kPeakSums; ++k) sum[k][i] = outside;
  }
  for (int64_t r = 0; r < repetitions; ++r)
#pragma GCC unroll 24
    for (int k = 0; k < kPeakSums; ++k) sum[k] = multiply_add(Math{}, sum[k], x, w);
  for (int i = 0; i < kFloats; ++i)
#pragma GCC unroll 24
    for (int k = 0; k < kPeakSums; ++k) outside = sum[k][i];
  return 2.0 * Math::kCell * kFloats * kPeakSums * double(repetitions);
}

}  // namespace
}  // namespace correctnet
