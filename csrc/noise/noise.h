// Device noise as a function of its address, one weight at a time, for host and device code.
//
// correctnet/noise/specification.py and arrays.py are the specification and explain each step; the results here are equal
// to the bit, which requires that every operation is rounded separately: compile with -ffp-contract=off and without fast-math.
// noise_fill.h computes the same for many weights with vector instructions.
//
// All functions but those that make a `Noise` have internal linkage: this header is compiled for several instruction sets, and
// of a function with external linkage the linker would keep one copy, possibly one that this machine cannot execute.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__)
#error "fast-math changes the noise"
#endif

#if defined(__CUDACC__)
#define CN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace correctnet {

// How a standard normal number z becomes a weight.
//
//   factor      weight * 2^(scale * z + offset), with two numbers for the whole layer
//   lognormal   weight * 2^((scale * spread) * z + offset * spread), `spread` of each weight being 1, or 0: exact
//   gaussian    spread * z + weight
enum class NoiseKind : uint32_t { factor, lognormal, gaussian };

// Stuck devices and gains. A weight's second word, div 2, exceeds some of the ascending thresholds; their number says
// which outcome it has: (keep * gain) * weight + (move * reach) * gain. `reach` is one number for each output, with the
// sign of the nominal weight if `sign` is the sign bit (else it is 0). The gain is (1 + chip_gain * z) (1 + column_gain *
// z') with one z for each chip and one z' for each of its outputs. Weights with the sign bit set in their `spread` are
// spared.
constexpr int kOutcomes = 6, kOutcomesPadded = 8;
struct Faults {
  bool any;
  int32_t threshold[kOutcomes - 1];
  float keep[kOutcomesPadded], move[kOutcomesPadded];
  uint32_t sign;
  float chip_gain, column_gain;
};

// What the words of an address are for. The rest of an address is the same; one of a column has the output in place of
// the element, one of a chip neither layer nor element.
enum Purpose : uint32_t { kProgram = 0, kFault = 1, kColumn = 4, kChip = 6 };

// Address and parameters of the noise of one layer on one chip sample. z depends on (seed, layer, sample, purpose,
// element) alone. What is stored for a layer of a network leaves seed and sample at 0; `noise::on_chip` fills them in.
// Faults go with the kinds that read arrays, which have purpose 0.
struct Noise {
  uint64_t seed;
  uint32_t layer, sample, purpose;
  float scale, offset;
  NoiseKind kind = NoiseKind::factor;
  Faults faults = {};
};

// Nominal weights in the order of elements, and what noise that is no factor reads: the spread of each weight, and the
// reach of each run of `row` weights (an output's) where devices are stuck.
struct Nominal {
  const float* weight;
  const float* spread = nullptr;
  const float* reach = nullptr;
  int64_t row = 0;
};

// Sizes of a weight tensor: `rows` outputs of (taps, channels) = (kh * kw, in), the order that elements count in. In
// memory a row is (taps, channels) if `channels_last`, else (channels, taps).
struct WeightShape {
  int64_t rows, taps, channels;
  bool channels_last;
};

// The noise exp(sigma * z + shift) of a layer. `layer` is its index in the noise specification. Throws
// std::invalid_argument unless every factor is a normal float32 number.
Noise lognormal_noise(uint32_t layer, double sigma, double shift, uint32_t purpose = 0);

// The same for weights that have a spread of their own, and noise that is Gaussian with a spread of each weight.
Noise spread_noise(uint32_t layer, double sigma, double shift, const Faults& faults = {});
Noise gaussian_noise(uint32_t layer, const Faults& faults = {});

namespace {
namespace noise {

constexpr int kDegree = 5, kOctaves = 32;
constexpr float kNormal[(kDegree + 1) * kOctaves] = {
#include "noise/normal_table.inc"
};
constexpr float kUniformScale = 0x1.fffffep-33f, kUniformOffset = 0x1p-33f;  // 2^-32 - 2^-56: p stays below 1/2
constexpr float kMagic = 0x1.8p23f;  // adding it rounds a float to an integer, found in the low bits

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

CN_HOST_DEVICE uint32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
#endif
}

CN_HOST_DEVICE float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// a * b + c, rounded once.
CN_HOST_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double. Rounding the sum to float rounds twice, which matters only if the double lies
  // halfway between two floats: then the error of the sum (Knuth's TwoSum) tells on which side the exact value is. The
  // specification does the same. Subnormal results are not handled; no polynomial here has any.
  const double product = double(a) * double(b), addend = c;
  double sum = product + addend;
  uint64_t u;
  memcpy(&u, &sum, sizeof u);
  if (__builtin_expect((u & 0x1fffffff) == 0x10000000, 0)) {
    const double part = sum - product, error = (product - (sum - part)) + (addend - part);
    if (error != 0) u += (error > 0) == (sum > 0) ? 1 : -1;
    memcpy(&sum, &u, sizeof sum);
  }
  return float(sum);
#endif
}

CN_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

CN_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

struct Block {
  uint32_t word[4];
};

// Philox4x32-10. `counter`: (element / 4, sample, layer, purpose); `key`: the seed.
CN_HOST_DEVICE Block philox4x32(Block counter, uint64_t key) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32), *c = counter.word;
  for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    const uint64_t p0 = uint64_t(kMultiplier0) * c[0], p1 = uint64_t(kMultiplier1) * c[2];
    counter = {{uint32_t(p1 >> 32) ^ c[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key1, uint32_t(p0)}};
  }
  return counter;
}

// The same layer's noise on another chip sample.
CN_HOST_DEVICE Noise on_chip(Noise noise, uint64_t seed, uint32_t sample) {
  noise.seed = seed;
  noise.sample = sample;
  return noise;
}

// The words of elements 4 * block ... 4 * block + 3.
CN_HOST_DEVICE Block words(const Noise& noise, uint32_t block) {
  return philox4x32({{block, noise.sample, noise.layer, noise.purpose}}, noise.seed);
}

// Standard normal number of a random word. `table`: kNormal, or a copy of it in device memory.
CN_HOST_DEVICE float normal(uint32_t word, const float* table) {
  const float p = fma(float(word >> 1), kUniformScale, kUniformOffset);  // 2^-33 <= p < 1/2
  const uint32_t octave = (0x3effffff - bits(p)) >> 23;                  // p in [2^-(octave + 2), 2^-(octave + 1))
  const float t = add(from_bits((bits(p) & 0x7fffff) | 0x3f800000), -1.5f);
  float z = table[kDegree * kOctaves + octave];
  for (int j = kDegree - 1; j >= 0; --j) z = fma(z, t, table[j * kOctaves + octave]);
  return from_bits(bits(z) ^ word << 31);
}

// Coefficient of r^j in 2^r, |r| <= 1/2. A function, because device code cannot read host arrays.
CN_HOST_DEVICE constexpr float exp2_coefficient(int j) {
  constexpr float c[kDegree + 1] = {0x1p+0f,        0x1.62e43p-1f,  0x1.ebf9b2p-3f,
                                    0x1.c6afb0p-5f, 0x1.3ced86p-7f, 0x1.5eeceep-10f};
  return c[j];
}

// 2^x for |x| <= 126.
CN_HOST_DEVICE float exp2(float x) {
  const float rounded = add(x, kMagic), r = add(x, -add(rounded, -kMagic));
  float y = exp2_coefficient(kDegree);
  for (int j = kDegree - 1; j >= 0; --j) y = fma(y, r, exp2_coefficient(j));
  return from_bits(bits(y) + (bits(rounded) << 23));
}

// The factor of a random word; `table` as for `normal`.
CN_HOST_DEVICE float lognormal(uint32_t word, const Noise& noise, const float* table) {
  return exp2(fma(normal(word, table), noise.scale, noise.offset));
}

// The weight of a kind that reads arrays, from z.
CN_HOST_DEVICE float spread_weight(float z, float weight, float spread, const Noise& noise) {
  if (noise.kind == NoiseKind::gaussian) return fma(z, spread, weight);
  return multiply(weight, exp2(fma(z, multiply(noise.scale, spread), multiply(noise.offset, spread))));
}

// The address of a layer's words for another purpose.
CN_HOST_DEVICE Noise for_purpose(Noise noise, Purpose purpose) {
  noise.purpose = purpose;
  if (purpose == kChip) noise.layer = 0;
  return noise;
}

// The gain of an output on a chip; `table` as for `normal`.
CN_HOST_DEVICE float gain(const Noise& noise, int64_t output, const float* table) {
  const float chip = normal(words(for_purpose(noise, kChip), 0).word[0], table);
  const Block columns = words(for_purpose(noise, kColumn), uint32_t(output >> 2));
  const int at = int(output & 3);
  const uint32_t word = at == 0 ? columns.word[0] : at == 1 ? columns.word[1] : at == 2 ? columns.word[2] : columns.word[3];
  const Faults& f = noise.faults;
  return multiply(fma(chip, f.chip_gain, 1.0f), fma(normal(word, table), f.column_gain, 1.0f));
}

// What stuck devices and a gain leave of `value`; `word` is the element's of purpose kFault, `keep` and `move` are those
// of the outcomes, with the reach and gain of the output.
CN_HOST_DEVICE float faulty_weight(float value, float weight, float spread, uint32_t word, const Faults& faults,
                                   const float* keep, const float* move) {
  if (bits(spread) >> 31) return value;
  float kept = keep[0], moved = move[0];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < kOutcomes - 1; ++j)
    if (int32_t(word >> 1) > faults.threshold[j]) {
      kept = keep[j + 1];
      moved = move[j + 1];
    }
  return fma(kept, value, from_bits(bits(moved) ^ (bits(weight) & faults.sign)));
}

// The same with the outcomes as the layer has them.
CN_HOST_DEVICE float faulty_weight(float value, float weight, float spread, float reach, float gain, uint32_t word,
                                   const Faults& faults) {
  float keep[kOutcomes], move[kOutcomes];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kOutcomes; ++k) {
    keep[k] = multiply(faults.keep[k], gain);
    move[k] = multiply(multiply(faults.move[k], reach), gain);
  }
  return faulty_weight(value, weight, spread, word, faults, keep, move);
}

// Nearest bfloat16, ties to even. Like the instruction, it flushes subnormal numbers to zero and maps NaN to NaN.
CN_HOST_DEVICE uint16_t bfloat16(float x) {
  const uint32_t u = bits(x), magnitude = u & 0x7fffffff;
  if (magnitude < 0x00800000) return uint16_t((u & 0x80000000) >> 16);
  if (magnitude > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace noise
}  // namespace
}  // namespace correctnet
