// The register tile of the layout "images in lanes" (kernels.h) for the instruction set that the including file is
// compiled for: AVX-512 with or without BF16, AVX2 with FMA, or portable C++.
//
//   Lanes                16 floats, one image a lane, and the operations on them that the kernels need. All of them
//                        propagate NaN, including `max`, `relu` and `clamp` (of their first operand), as in torch.
//                        if_negative(s, a, b): a where the sign of s is set, else b. power_of_two(a): 2^n for a =
//                        n + 1.5 * 2^23, -126 <= n <= 127
//   Float, Bfloat16      sum += x * w for NV vectors of images and NC outputs, NV * NC sums in registers: the step
//                        through one slot, and how the weights of a panel are packed for it
//
// With AVX-512 a tile is 4 vectors x 6 outputs: 24 of 32 registers are sums, and 10 loads feed 24 multiply-adds. AVX2
// holds 1 x 6 (a vector is two registers). Sums are accumulated in the order (kernel row, kernel column, channel) with
// fused multiply-adds wherever the machine has them, so AVX-512 and AVX2 agree in float32 bit for bit.
//
// Everything here has internal linkage (see kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/kernels.h"

#define CN_INLINE inline __attribute__((always_inline))

namespace correctnet {
namespace {

// ---- 16 lanes -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int kMaxVectors = 4;  // image vectors in a tile

struct Lanes {
  __m512 v;
};

CN_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
CN_INLINE Lanes splat(float a) { return {_mm512_set1_ps(a)}; }
CN_INLINE Lanes load(const void* p) { return {_mm512_load_ps(p)}; }
CN_INLINE void store(void* p, Lanes a) { _mm512_store_ps(p, a.v); }
CN_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
CN_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
CN_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
CN_INLINE Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
CN_INLINE Lanes sqrt(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
CN_INLINE Lanes relu(Lanes a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // propagates NaN: the second operand
CN_INLINE Lanes clamp(Lanes a, Lanes low, Lanes high) { return {_mm512_min_ps(high.v, _mm512_max_ps(low.v, a.v))}; }
CN_INLINE Lanes if_negative(Lanes sign, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign.v)), b.v, a.v)};
}
CN_INLINE Lanes power_of_two(Lanes a) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23), _mm512_set1_epi32(0x3f800000)))};
}
CN_INLINE Lanes max(Lanes a, Lanes b) {
  return {_mm512_mask_max_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v, b.v)};
}
CN_INLINE Lanes load_even(const void* p) {  // the even channel of a bfloat16 slot
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(p), 16))};
}
CN_INLINE Lanes load_odd(const void* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(p), _mm512_set1_epi32(int(0xffff0000u))))};
}

#if defined(__AVX512BF16__)
CN_INLINE void store_pair(void* p, Lanes even, Lanes odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_store_si512(p, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v)));
}
#else
CN_INLINE __m512i rounded(Lanes a) {  // to bfloat16, nearest even; the upper half of each lane counts
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i bias =
      _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  return _mm512_mask_or_epi32(_mm512_add_epi32(u, bias), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), u,
                              _mm512_set1_epi32(0x400000));
}
CN_INLINE void store_pair(void* p, Lanes even, Lanes odd) {
  _mm512_store_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded(even), 16), rounded(odd)));
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kMaxVectors = 1;

struct Lanes {
  __m256 a, b;
};

CN_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
CN_INLINE Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
CN_INLINE Lanes load(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {_mm256_load_ps(f), _mm256_load_ps(f + 8)};
}
CN_INLINE void store(void* p, Lanes x) {
  float* f = static_cast<float*>(p);
  _mm256_store_ps(f, x.a);
  _mm256_store_ps(f + 8, x.b);
}
CN_INLINE Lanes fma(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
CN_INLINE Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
CN_INLINE Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
CN_INLINE Lanes div(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
CN_INLINE Lanes sqrt(Lanes x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
CN_INLINE Lanes relu(Lanes x) {  // propagates NaN: the second operand
  return {_mm256_max_ps(_mm256_setzero_ps(), x.a), _mm256_max_ps(_mm256_setzero_ps(), x.b)};
}
CN_INLINE Lanes clamp(Lanes x, Lanes low, Lanes high) {
  return {_mm256_min_ps(high.a, _mm256_max_ps(low.a, x.a)), _mm256_min_ps(high.b, _mm256_max_ps(low.b, x.b))};
}
CN_INLINE Lanes if_negative(Lanes sign, Lanes x, Lanes y) {
  return {_mm256_blendv_ps(y.a, x.a, sign.a), _mm256_blendv_ps(y.b, x.b, sign.b)};
}
CN_INLINE __m256 power_of_two(__m256 x) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(0x3f800000)));
}
CN_INLINE Lanes power_of_two(Lanes x) { return {power_of_two(x.a), power_of_two(x.b)}; }
CN_INLINE __m256 max(__m256 x, __m256 y) {
  return _mm256_blendv_ps(_mm256_max_ps(x, y), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
CN_INLINE Lanes max(Lanes x, Lanes y) { return {max(x.a, y.a), max(x.b, y.b)}; }
CN_INLINE Lanes load_even(const void* p) {
  const __m256i* u = static_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(u), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(u + 1), 16))};
}
CN_INLINE Lanes load_odd(const void* p) {
  const __m256i* u = static_cast<const __m256i*>(p);
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256(u), upper)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256(u + 1), upper))};
}
CN_INLINE __m256i rounded(__m256 a) {  // to bfloat16, nearest even; the upper half of each lane counts
  const __m256i u = _mm256_castps_si256(a);
  const __m256i bias =
      _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  return _mm256_blendv_epi8(_mm256_add_epi32(u, bias), _mm256_or_si256(u, _mm256_set1_epi32(0x400000)),
                            _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
CN_INLINE void store_pair(void* p, Lanes even, Lanes odd) {
  __m256i* u = static_cast<__m256i*>(p);
  _mm256_store_si256(u, _mm256_blend_epi16(_mm256_srli_epi32(rounded(even.a), 16), rounded(odd.a), 0xaa));
  _mm256_store_si256(u + 1, _mm256_blend_epi16(_mm256_srli_epi32(rounded(even.b), 16), rounded(odd.b), 0xaa));
}

#else

constexpr int kMaxVectors = 1;

struct Lanes {
  float v[kLanes];
};

CN_INLINE Lanes splat(float a) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a;
  return r;
}
CN_INLINE Lanes zero() { return splat(0); }
CN_INLINE Lanes load(const void* p) {
  Lanes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
CN_INLINE void store(void* p, Lanes a) { memcpy(p, a.v, sizeof a.v); }
CN_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {  // rounds twice: a fused one without hardware is a slow library call
  for (int i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
CN_INLINE Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
CN_INLINE Lanes mul(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
CN_INLINE Lanes div(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] /= b.v[i];
  return a;
}
CN_INLINE Lanes sqrt(Lanes a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
CN_INLINE Lanes max(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) b.v[i] = (a.v[i] > b.v[i]) | (a.v[i] != a.v[i]) ? a.v[i] : b.v[i];
  return b;
}
CN_INLINE Lanes relu(Lanes a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = 0 > a.v[i] ? 0 : a.v[i];
  return a;
}
CN_INLINE Lanes clamp(Lanes a, Lanes low, Lanes high) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = low.v[i] > a.v[i] ? low.v[i] : a.v[i];
  for (int i = 0; i < kLanes; ++i) a.v[i] = high.v[i] < a.v[i] ? high.v[i] : a.v[i];
  return a;
}
CN_INLINE Lanes from_bits(const uint32_t (&u)[kLanes]) {
  Lanes r;
  memcpy(r.v, u, sizeof u);
  return r;
}
CN_INLINE Lanes if_negative(Lanes sign, Lanes a, Lanes b) {
  uint32_t u[kLanes];
  memcpy(u, sign.v, sizeof u);
  for (int i = 0; i < kLanes; ++i) b.v[i] = u[i] >> 31 ? a.v[i] : b.v[i];
  return b;
}
CN_INLINE Lanes power_of_two(Lanes a) {
  uint32_t u[kLanes];
  memcpy(u, a.v, sizeof u);
  for (int i = 0; i < kLanes; ++i) u[i] = (u[i] << 23) + 0x3f800000u;
  return from_bits(u);
}
CN_INLINE Lanes load_even(const void* p) {
  uint32_t u[kLanes];
  memcpy(u, p, sizeof u);
  for (int i = 0; i < kLanes; ++i) u[i] <<= 16;
  return from_bits(u);
}
CN_INLINE Lanes load_odd(const void* p) {
  uint32_t u[kLanes];
  memcpy(u, p, sizeof u);
  for (int i = 0; i < kLanes; ++i) u[i] &= 0xffff0000u;
  return from_bits(u);
}
CN_INLINE void store_pair(void* p, Lanes even, Lanes odd) {
  uint32_t u[kLanes];
  for (int i = 0; i < kLanes; ++i) u[i] = noise::bfloat16(even.v[i]) | uint32_t(noise::bfloat16(odd.v[i])) << 16;
  memcpy(p, u, sizeof u);
}

#endif

// ---- one step through a slot ----------------------------------------------------------------------------------------
//
// x + at[v] is the slot of image vector v. Weights are packed in cells of 4 bytes: kCell channels of one output, drawn
// in the type Drawn; the cells of the NC outputs lie side by side.

struct Float {
  static constexpr int kChannels = 1;     // in a slot
  static constexpr int kWeightBytes = 4;  // of one output's weights for a slot
  static constexpr int kCell = 1;
  using Drawn = float;

  static CN_INLINE uint32_t cell(const float* w) {
    uint32_t u;
    memcpy(&u, w, 4);
    return u;
  }

  template <int NV, int NC>
  static CN_INLINE void step(Lanes (&sum)[NV][NC], const char* x, const ptrdiff_t (&at)[NV], const char* weights) {
    const float* w = reinterpret_cast<const float*>(weights);
    Lanes image[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) image[v] = load(x + at[v]);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      const Lanes weight = splat(w[c]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v][c] = fma(image[v], weight, sum[v][c]);
    }
  }
};

#if defined(__AVX512BF16__)

struct Bfloat16 {  // a cell holds both channels of a slot
  static constexpr int kChannels = 2;
  static constexpr int kWeightBytes = 4;
  static constexpr int kCell = 2;
  using Drawn = uint16_t;

  static CN_INLINE uint32_t cell(const uint16_t* w) {
    uint32_t u;
    memcpy(&u, w, 4);
    return u;
  }

  template <int NV, int NC>
  static CN_INLINE void step(Lanes (&sum)[NV][NC], const char* x, const ptrdiff_t (&at)[NV], const char* weights) {
    __m512bh image[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) image[v] = (__m512bh)_mm512_load_si512(x + at[v]);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      int pair;
      memcpy(&pair, weights + 4 * c, 4);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v][c].v = _mm512_dpbf16_ps(sum[v][c].v, image[v], weight);
    }
  }
};

#else

struct Bfloat16 {  // a cell holds one channel, rounded to bfloat16 but stored as float32
  static constexpr int kChannels = 2;
  static constexpr int kWeightBytes = 8;
  static constexpr int kCell = 1;
  using Drawn = uint16_t;

  static CN_INLINE uint32_t cell(const uint16_t* w) { return uint32_t(*w) << 16; }

  template <int NV, int NC>
  static CN_INLINE void step(Lanes (&sum)[NV][NC], const char* x, const ptrdiff_t (&at)[NV], const char* weights) {
    const float* w = reinterpret_cast<const float*>(weights);
    Lanes image[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) image[v] = load_even(x + at[v]);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      const Lanes weight = splat(w[c]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v][c] = fma(image[v], weight, sum[v][c]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) image[v] = load_odd(x + at[v]);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      const Lanes weight = splat(w[NC + c]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v][c] = fma(image[v], weight, sum[v][c]);
    }
  }
};

#endif

}  // namespace
}  // namespace correctnet
