// Noisy weights in bulk: noise.h for many consecutive elements with AVX-512, with AVX2 and FMA, or with neither,
// depending on the flags that the including file is compiled with. The results are equal to the bit.
//
//     noise_fill(weight, first, count, noise, out)     out[i] = weight[first + i] * factor of element first + i
//     noise_fill(nullptr, first, count, noise, out)    out[i] = factor of element first + i
//     noise_fill(nominal, first, count, noise, out)    any kind of noise
//
// `out` is float32 or bfloat16 (uint16_t; the float32 product rounded). `first` and `count` are arbitrary; a start or
// end that is not aligned to a step (64 elements with AVX-512, 32 with AVX2) is slower. Internal linkage, as in
// noise.h.
#pragma once

#include <type_traits>

#include "noise/noise.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc bug 105593
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define CN_NOISE_INLINE inline __attribute__((always_inline))

namespace correctnet {
namespace {
namespace noise {

CN_NOISE_INLINE void store(float* p, float a) { *p = a; }
CN_NOISE_INLINE void store(uint16_t* p, float a) { *p = bfloat16(a); }

// Where a row of weights begins, and what its noise reads.
struct Source {
  const float* weight;  // null: the factors alone
  const float* spread;  // null without a kind that reads it

  CN_NOISE_INLINE Source at(int64_t i) const { return {weight ? weight + i : nullptr, spread ? spread + i : nullptr}; }
};

// The outcomes of a row: keep * gain and move * reach * gain.
struct RowFaults {
  float keep[kOutcomesPadded] = {}, move[kOutcomesPadded] = {};
  bool idle = false;  // whether the last outcome leaves a weight as it is

  RowFaults() = default;
  RowFaults(const Faults& faults, float reach, float gain) {
    for (int k = 0; k < kOutcomes; ++k) {
      keep[k] = multiply(faults.keep[k], gain);
      move[k] = multiply(multiply(faults.move[k], reach), gain);
    }
    idle = keep[kOutcomes - 1] == 1 && move[kOutcomes - 1] == 0;
  }
};

#if defined(__AVX2__)

// The table ordered by the biased exponent of p modulo 32, so that no octave has to be computed from it.
struct ByExponent {
  float row[kDegree + 1][kOctaves] = {};

  constexpr ByExponent() {
    for (int j = 0; j <= kDegree; ++j)
      for (int octave = 0; octave < kOctaves; ++octave) row[j][(125 - octave) % kOctaves] = kNormal[j * kOctaves + octave];
  }
};
constexpr ByExponent kByExponent;

// ---- the operations on a vector -------------------------------------------------------------------------------------

#if defined(__AVX512F__)

using Floats = __m512;
using Ints = __m512i;
constexpr int kVector = 16;

CN_NOISE_INLINE Ints splat(uint32_t a) { return _mm512_set1_epi32(int(a)); }
CN_NOISE_INLINE Ints splat64(uint64_t a) { return _mm512_set1_epi64(int64_t(a)); }
CN_NOISE_INLINE Floats splat(float a) { return _mm512_set1_ps(a); }
CN_NOISE_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
CN_NOISE_INLINE Ints load(const uint32_t* p) { return _mm512_loadu_si512(p); }
CN_NOISE_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
CN_NOISE_INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
CN_NOISE_INLINE Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
CN_NOISE_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
CN_NOISE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
CN_NOISE_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
CN_NOISE_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
CN_NOISE_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
CN_NOISE_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
CN_NOISE_INLINE Ints add64(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
CN_NOISE_INLINE Ints multiply64(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }  // of the low halves
CN_NOISE_INLINE Ints high64(Ints a) { return _mm512_srli_epi64(a, 32); }
CN_NOISE_INLINE Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
CN_NOISE_INLINE Ints exclusive_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
CN_NOISE_INLINE Ints and_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }
template <int n>
CN_NOISE_INLINE Ints shift_left(Ints a) { return _mm512_slli_epi32(a, n); }
template <int n>
CN_NOISE_INLINE Ints shift_right(Ints a) { return _mm512_srli_epi32(a, n); }
CN_NOISE_INLINE Ints xor_and(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0x78); }  // a ^ (b & c)
CN_NOISE_INLINE bool all_above(Ints a, int32_t limit) {
  return _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(limit)) == 0xffff;
}
CN_NOISE_INLINE Ints add_if_above(Ints count, Ints a, int32_t limit) {
  return _mm512_mask_add_epi32(count, _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(limit)), count, splat(1u));
}
CN_NOISE_INLINE Floats eight(const float* p) { return _mm512_castps256_ps512(_mm256_loadu_ps(p)); }
CN_NOISE_INLINE Floats look_up(Floats table, Ints index) { return _mm512_permutexvar_ps(index, table); }
CN_NOISE_INLINE Floats where_negative(Floats sign, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(as_ints(sign)), no, yes);
}

// Blocks of the 64-bit lanes, such that `interleave` puts the words of blocks 0, 1, 2, ... one after the other.
CN_NOISE_INLINE Ints lane_blocks() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
CN_NOISE_INLINE void interleave(Ints low, Ints high, Ints* words) {
  words[0] = _mm512_unpacklo_epi64(low, high);
  words[1] = _mm512_unpackhi_epi64(low, high);
}
// (hi(product) ^ c ^ key, lo(product)) as the low and the high half of each 64-bit lane
CN_NOISE_INLINE Ints last_round(Ints product, Ints c, uint32_t key) {
  const Ints swapped = _mm512_shuffle_epi32(product, _MM_PERM_CDAB);
  return _mm512_mask_ternarylogic_epi32(swapped, 0x5555, c, splat(key), 0x96);
}

// The octave table in two registers a row. The permutation ignores all but the lowest five bits of the exponent.
struct Table {
  Floats row[kDegree + 1][2];

  CN_NOISE_INLINE Table() {
    for (int j = 0; j <= kDegree; ++j)
      for (int half = 0; half < 2; ++half) row[j][half] = load(kByExponent.row[j] + half * kVector);
  }
  CN_NOISE_INLINE void coefficients(Floats p, Floats* c) const {
    const Ints exponent = shift_right<23>(as_ints(p));
    for (int j = 0; j <= kDegree; ++j) c[j] = _mm512_permutex2var_ps(row[j][0], exponent, row[j][1]);
  }
};

CN_NOISE_INLINE void store(uint16_t* p, Floats a, Floats b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (Ints)_mm512_cvtne2ps_pbh(b, a));
#else
  const auto round = [](Floats f) {
    const Ints u = as_ints(f);
    const Ints odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), splat(1u));
    Ints rounded = _mm512_add_epi32(_mm512_add_epi32(u, splat(0x7fffu)), odd);
    rounded = _mm512_mask_and_epi32(rounded, _mm512_cmplt_epu32_mask(_mm512_add_epi32(u, u), splat(0x01000000u)), u,
                                    splat(0x80000000u));
    rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), u, splat(0x400000u));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  };
  _mm256_storeu_si256((__m256i*)p, round(a));
  _mm256_storeu_si256((__m256i*)(p + 16), round(b));
#endif
}

#else  // AVX2

using Floats = __m256;
using Ints = __m256i;
constexpr int kVector = 8;

CN_NOISE_INLINE Ints splat(uint32_t a) { return _mm256_set1_epi32(int(a)); }
CN_NOISE_INLINE Ints splat64(uint64_t a) { return _mm256_set1_epi64x(int64_t(a)); }
CN_NOISE_INLINE Floats splat(float a) { return _mm256_set1_ps(a); }
CN_NOISE_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
CN_NOISE_INLINE Ints load(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
CN_NOISE_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
CN_NOISE_INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
CN_NOISE_INLINE Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
CN_NOISE_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
CN_NOISE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
CN_NOISE_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
CN_NOISE_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
CN_NOISE_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
CN_NOISE_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
CN_NOISE_INLINE Ints add64(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
CN_NOISE_INLINE Ints multiply64(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
CN_NOISE_INLINE Ints high64(Ints a) { return _mm256_srli_epi64(a, 32); }
CN_NOISE_INLINE Ints exclusive_or(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
CN_NOISE_INLINE Ints exclusive_or(Ints a, Ints b, Ints c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
CN_NOISE_INLINE Ints and_or(Ints a, Ints b, Ints c) { return _mm256_or_si256(_mm256_and_si256(a, b), c); }
template <int n>
CN_NOISE_INLINE Ints shift_left(Ints a) { return _mm256_slli_epi32(a, n); }
template <int n>
CN_NOISE_INLINE Ints shift_right(Ints a) { return _mm256_srli_epi32(a, n); }
CN_NOISE_INLINE Ints xor_and(Ints a, Ints b, Ints c) { return _mm256_xor_si256(a, _mm256_and_si256(b, c)); }
CN_NOISE_INLINE bool all_above(Ints a, int32_t limit) {
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32(a, _mm256_set1_epi32(limit))) == -1;
}
CN_NOISE_INLINE Ints add_if_above(Ints count, Ints a, int32_t limit) {
  return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(a, _mm256_set1_epi32(limit)));
}
CN_NOISE_INLINE Floats eight(const float* p) { return _mm256_loadu_ps(p); }
CN_NOISE_INLINE Floats look_up(Floats table, Ints index) { return _mm256_permutevar8x32_ps(table, index); }
CN_NOISE_INLINE Floats where_negative(Floats sign, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, sign); }

CN_NOISE_INLINE Ints lane_blocks() { return _mm256_setr_epi64x(0, 2, 1, 3); }
CN_NOISE_INLINE void interleave(Ints low, Ints high, Ints* words) {
  words[0] = _mm256_unpacklo_epi64(low, high);
  words[1] = _mm256_unpackhi_epi64(low, high);
}
CN_NOISE_INLINE Ints last_round(Ints product, Ints c, uint32_t key) {
  const Ints low = exclusive_or(_mm256_srli_epi64(product, 32), c, splat(key));
  return _mm256_blend_epi32(low, _mm256_slli_epi64(product, 32), 0xAA);
}

// In 97 % of the cases all eight p of a vector lie in the upper eight octaves, where permuting one register suffices;
// the permutation ignores all but the lowest three bits of the exponent.
struct Table {
  Floats upper[kDegree + 1];

  CN_NOISE_INLINE Table() {
    for (int j = 0; j <= kDegree; ++j) {
      const float* row = kByExponent.row[j];  // exponents 118 to 125 are 22 to 29 modulo 32
      upper[j] = _mm256_setr_ps(row[24], row[25], row[26], row[27], row[28], row[29], row[22], row[23]);
    }
  }
  CN_NOISE_INLINE void coefficients(Floats p, Floats* c) const {
    const Ints exponent = shift_right<23>(as_ints(p));
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(p, splat(0x1p-9f), _CMP_LT_OQ)) == 0, 1)) {
      for (int j = 0; j <= kDegree; ++j) c[j] = _mm256_permutevar8x32_ps(upper[j], exponent);
    } else {
      const Ints index = _mm256_and_si256(exponent, splat(31u));
      for (int j = 0; j <= kDegree; ++j) c[j] = _mm256_i32gather_ps(kByExponent.row[j], index, 4);
    }
  }
};

CN_NOISE_INLINE void store(uint16_t* p, Floats a, Floats b) {
  const auto round = [](Floats f) {
    const Ints u = as_ints(f), magnitude = _mm256_and_si256(u, splat(0x7fffffffu));
    const Ints odd = _mm256_and_si256(shift_right<16>(u), splat(1u));
    const Ints rounded = add(add(u, splat(0x7fffu)), odd), quiet = _mm256_or_si256(u, splat(0x400000u));
    const Ints small = _mm256_cmpgt_epi32(splat(0x00800000u), magnitude), zero = _mm256_and_si256(u, splat(0x80000000u));
    const Ints nan = _mm256_cmpgt_epi32(magnitude, splat(0x7f800000u));
    return shift_right<16>(_mm256_blendv_epi8(_mm256_blendv_epi8(rounded, zero, small), quiet, nan));
  };
  const Ints packed = _mm256_packus_epi32(round(a), round(b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xD8));
}

#endif

// ---- common to AVX-512 and AVX2 ------------------------------------------------------------------------------------

// The keys of all rounds, and the parts of the first three rounds that do not depend on the block.
struct Schedule {
  uint32_t key0[10], key1[10];
  uint32_t first, second0, second1, third;

  explicit Schedule(const Noise& noise) {
    for (uint32_t round = 0; round < 10; ++round) {
      key0[round] = uint32_t(noise.seed) + round * kWeyl0;
      key1[round] = uint32_t(noise.seed >> 32) + round * kWeyl1;
    }
    const uint64_t p1 = uint64_t(kMultiplier1) * noise.layer;
    const uint64_t p0 = uint64_t(kMultiplier0) * (uint32_t(p1 >> 32) ^ noise.sample ^ key0[0]);
    first = noise.purpose ^ key1[0];
    second0 = uint32_t(p1) ^ key0[1];
    second1 = uint32_t(p0 >> 32) ^ key1[1];
    third = uint32_t(p0) ^ key1[2];
  }
};

// Philox4x32-10 of the blocks in the 64-bit lanes of `kCount` vectors: 2 * kCount vectors of words, in order. The high
// halves of the lanes are arbitrary, since multiplications ignore them; the last round discards them.
template <int kCount>
CN_NOISE_INLINE void philox(const Schedule& s, const Ints* block, Ints* words) {
  const Ints m0 = splat64(kMultiplier0), m1 = splat64(kMultiplier1);
  Ints c0[kCount], c1[kCount], c2[kCount], c3[kCount];
  for (int g = 0; g < kCount; ++g) {
    const Ints p = multiply64(block[g], m0);
    const Ints q = multiply64(exclusive_or(high64(p), splat64(s.first)), m1);
    const Ints p0 = multiply64(exclusive_or(high64(q), splat64(s.second0)), m0);
    const Ints p1 = multiply64(exclusive_or(p, splat64(s.second1)), m1);
    c0[g] = exclusive_or(high64(p1), q, splat64(s.key0[2]));
    c2[g] = exclusive_or(high64(p0), splat64(s.third));
    c1[g] = p1;
    c3[g] = p0;
  }
#pragma GCC unroll 6
  for (int round = 3; round < 9; ++round)
    for (int g = 0; g < kCount; ++g) {
      const Ints p0 = multiply64(c0[g], m0), p1 = multiply64(c2[g], m1);
      c0[g] = exclusive_or(high64(p1), c1[g], splat64(s.key0[round]));
      c2[g] = exclusive_or(high64(p0), c3[g], splat64(s.key1[round]));
      c1[g] = p1;
      c3[g] = p0;
    }
  for (int g = 0; g < kCount; ++g) {
    const Ints p0 = multiply64(c0[g], m0), p1 = multiply64(c2[g], m1);
    interleave(last_round(p1, c1[g], s.key0[9]), last_round(p0, c3[g], s.key1[9]), words + 2 * g);
  }
}

CN_NOISE_INLINE Floats normal(Ints word, const Table& table) {
  const Floats p = fma(to_floats(shift_right<1>(word)), splat(kUniformScale), splat(kUniformOffset));
  const Floats t = subtract(as_floats(and_or(as_ints(p), splat(0x7fffffu), splat(0x3f800000u))), splat(1.5f));
  Floats c[kDegree + 1];
  table.coefficients(p, c);
  Floats z = c[kDegree];
  for (int j = kDegree - 1; j >= 0; --j) z = fma(z, t, c[j]);
  return as_floats(exclusive_or(as_ints(z), shift_left<31>(word)));
}

CN_NOISE_INLINE Floats exp2(Floats x) {
  const Floats rounded = add(x, splat(kMagic)), r = subtract(x, subtract(rounded, splat(kMagic)));
  Floats y = splat(exp2_coefficient(kDegree));
  for (int j = kDegree - 1; j >= 0; --j) y = fma(y, r, splat(exp2_coefficient(j)));
  return as_floats(add(as_ints(y), shift_left<23>(as_ints(rounded))));
}

CN_NOISE_INLINE void store(float* p, Floats a, Floats b) {
  store(p, a);
  store(p + kVector, b);
}

// kFaults: whether there are stuck devices or gains. The factor alone needs no arrays and has no faults.
template <class T, NoiseKind kKind, bool kFaults>
class Filler {
 public:
  explicit Filler(const Noise& noise) : noise_(noise), schedule_(noise), faults_(for_purpose(noise, kFault)) {}

  // `source` points at element `first`.
  void operator()(Source source, int64_t first, int64_t count, T* out, const RowFaults& row = {}) const {
    constexpr int kStep = 4 * kVector;
    int64_t done = -(first & 3);
    Ints block = add64(splat64(uint64_t(first) >> 2), lane_blocks());
    for (; done < count; done += kStep, block = add64(block, splat64(kVector))) {
      if (done >= 0 && done + kStep <= count)
        step<2>(block, source.at(done), row, out + done);
      else if (count - done > kStep / 2)
        part<2>(block, source, row, done, count, out);
      else
        part<1>(block, source, row, done, count, out);
    }
  }

 private:
  template <int kCount>
  CN_NOISE_INLINE void step(Ints first_blocks, Source source, const RowFaults& row, T* out) const {
    Ints block[kCount], words[2 * kCount], fault[2 * kCount];
    for (int g = 0; g < kCount; ++g) block[g] = g ? add64(first_blocks, splat64(g * kVector / 2)) : first_blocks;
    philox<kCount>(schedule_, block, words);
    if constexpr (kFaults) philox<kCount>(faults_, block, fault);
    for (int i = 0; i < 2 * kCount; i += 2) {
      Floats f[2];
      for (int j = 0; j < 2; ++j)
        f[j] = value(words[i + j], kFaults ? fault[i + j] : words[i + j], source.at((i + j) * kVector), row);
      store(out + i * kVector, f[0], f[1]);
    }
  }

  CN_NOISE_INLINE Floats value(Ints word, Ints fault, Source source, const RowFaults& row) const {
    const Floats z = normal(word, table_);
    if constexpr (kKind == NoiseKind::factor) {
      const Floats factor = exp2(fma(z, splat(noise_.scale), splat(noise_.offset)));
      return source.weight ? multiply(load(source.weight), factor) : factor;
    } else {
      const Floats weight = load(source.weight), spread = load(source.spread);
      Floats v;
      if constexpr (kKind == NoiseKind::gaussian)
        v = fma(z, spread, weight);
      else
        v = multiply(weight, exp2(fma(z, multiply(splat(noise_.scale), spread), multiply(splat(noise_.offset), spread))));
      if constexpr (kFaults) {
        const Faults& faults = noise_.faults;
        const Ints u = shift_right<1>(fault);
        if (row.idle && all_above(u, faults.threshold[kOutcomes - 2])) return v;  // most vectors, where faults are rare
        Ints outcome = splat(0u);
        for (int j = 0; j < kOutcomes - 1; ++j) outcome = add_if_above(outcome, u, faults.threshold[j]);
        const Ints moved = as_ints(look_up(eight(row.move), outcome));
        const Floats signed_move = as_floats(xor_and(moved, as_ints(weight), splat(faults.sign)));
        v = where_negative(spread, v, fma(look_up(eight(row.keep), outcome), v, signed_move));
      }
      return v;
    }
  }

  // A partial step: only the elements with 0 <= done + i < count exist.
  template <int kCount>
  __attribute__((noinline)) void part(Ints block, Source source, const RowFaults& row, int64_t done, int64_t count,
                                      T* out) const {
    constexpr int kSize = 2 * kCount * kVector;
    const int64_t begin = done < 0 ? -done : 0, end = count - done < kSize ? count - done : kSize;
    float w[kSize] = {}, s[kKind == NoiseKind::factor ? 1 : kSize] = {};
    T o[kSize];
    if (source.weight) memcpy(w + begin, source.weight + done + begin, (end - begin) * sizeof(float));
    if constexpr (kKind != NoiseKind::factor)
      memcpy(s + begin, source.spread + done + begin, (end - begin) * sizeof(float));
    step<kCount>(block, {source.weight ? w : nullptr, source.spread ? s : nullptr}, row, o);
    memcpy(out + done + begin, o + begin, (end - begin) * sizeof(T));
  }

  struct Nothing {
    explicit Nothing(const Noise&) {}
  };

  Noise noise_;
  Schedule schedule_;
  std::conditional_t<kFaults, Schedule, Nothing> faults_;
  Table table_;
};

#else  // neither: one element at a time

template <class T, NoiseKind kKind, bool kFaults>
class Filler {
 public:
  explicit Filler(const Noise& noise) : noise_(noise) {}

  void operator()(Source source, int64_t first, int64_t count, T* out, const RowFaults& row = {}) const {
    int64_t done = -(first & 3);
    for (uint32_t block = uint32_t(first >> 2); done < count; done += 4, ++block) {
      const Block drawn = words(noise_, block);
      Block fault = {};
      if constexpr (kFaults) fault = words(for_purpose(noise_, kFault), block);
      for (int64_t i = done < 0 ? -done : 0; i < 4 && done + i < count; ++i)
        store(out + done + i, value(drawn.word[i], fault.word[i], source.at(done + i), row));
    }
  }

 private:
  CN_NOISE_INLINE float value(uint32_t word, uint32_t fault, Source source, const RowFaults& row) const {
    if constexpr (kKind == NoiseKind::factor) {
      const float factor = lognormal(word, noise_, kNormal);
      return source.weight ? multiply(*source.weight, factor) : factor;
    } else {
      const float v = spread_weight(normal(word, kNormal), *source.weight, *source.spread, noise_);
      return kFaults ? faulty_weight(v, *source.weight, *source.spread, fault, noise_.faults, row.keep, row.move) : v;
    }
  }

  Noise noise_;
};

#endif

}  // namespace noise

template <class T>
inline void noise_fill(const float* weight, int64_t first, int64_t count, const Noise& noise, T* out) {
  noise::Filler<T, NoiseKind::factor, false>{noise}({weight ? weight + first : nullptr, nullptr}, first, count, out);
}

namespace noise {

template <class T, NoiseKind kKind>
void fill_spread(const Nominal& nominal, int64_t first, int64_t count, const Noise& noise, T* out) {
  const Source source{nominal.weight, nominal.spread};
  if (!noise.faults.any) return Filler<T, kKind, false>{noise}(source.at(first), first, count, out);
  const Filler<T, kKind, true> filler{noise};
  for (int64_t at = first, end; at < first + count; at = end) {
    const int64_t row = at / nominal.row;
    end = (row + 1) * nominal.row < first + count ? (row + 1) * nominal.row : first + count;
    const bool gains = noise.faults.chip_gain != 0 || noise.faults.column_gain != 0;
    const RowFaults outcomes(noise.faults, nominal.reach[row], gains ? gain(noise, row, kNormal) : 1.0f);
    filler(source.at(at), at, end - at, out + (at - first), outcomes);
  }
}

}  // namespace noise

template <class T>
inline void noise_fill(const Nominal& nominal, int64_t first, int64_t count, const Noise& noise, T* out) {
  switch (noise.kind) {
    case NoiseKind::factor: return noise_fill(nominal.weight, first, count, noise, out);
    case NoiseKind::lognormal: return noise::fill_spread<T, NoiseKind::lognormal>(nominal, first, count, noise, out);
    case NoiseKind::gaussian: return noise::fill_spread<T, NoiseKind::gaussian>(nominal, first, count, noise, out);
  }
}

}  // namespace
}  // namespace correctnet
