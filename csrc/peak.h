// The most floating-point operations that a core can do: multiply-adds on as many independent sums as registers hold,
// without memory. No kernel can be faster, so `correctnet bench` measures the engine against it. Internal linkage, like
// lanes.h.
#pragma once

#include "lanes.h"

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

// Carries out `repetitions` times kPeakSums multiply-adds, and returns how many floating-point operations they were.
// What goes in is read from, and what comes out is written to, a volatile float, lane by lane: to the compiler all sums
// differ, and each of them is wanted.
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
