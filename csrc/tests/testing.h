// Shared by the tests of kernels and plans: checks, the kernels that this machine supports, noisy weights by the scalar
// code, and runs of a plan.
#pragma once

#include <random>
#include <vector>

#include "check.h"
#include "plan/plan.h"
#include "specification.h"

// One table for each instruction set that this machine supports, and AMX modelled in C++ (amx_tile.h).
inline std::vector<const correctnet::Kernels*> available() {
  std::vector<const correctnet::Kernels*> all = {&correctnet::kernels_amx_model};
  for (const correctnet::Isa isa : correctnet::supported_isas()) all.push_back(&correctnet::kernels(isa));
  return all;
}

inline const char* name(correctnet::Type type) { return type == correctnet::Type::float32 ? "float32" : "bfloat16"; }

inline float bfloat16(float a) {
  return correctnet::noise::from_bits(uint32_t(correctnet::noise::bfloat16(a)) << 16);
}

// The weight of an element on a chip by the scalar code.
inline float one_weight(const correctnet::Nominal& nominal, const correctnet::Noise& n, int64_t element) {
  namespace noise = correctnet::noise;
  const uint32_t word = noise::words(n, uint32_t(element / 4)).word[element % 4];
  const float weight = nominal.weight[element];
  if (n.kind == correctnet::NoiseKind::factor) return noise::multiply(weight, noise::lognormal(word, n, noise::kNormal));
  const float spread = nominal.spread[element];
  const float value = noise::spread_weight(noise::normal(word, noise::kNormal), weight, spread, n);
  if (!n.faults.any) return value;
  const uint32_t fault = noise::words(noise::for_purpose(n, correctnet::kFault), uint32_t(element / 4)).word[element % 4];
  const int64_t output = element / nominal.row;
  const float gain = noise::gain(n, output, noise::kNormal);  // 1, where there is none
  return noise::faulty_weight(value, weight, spread, nominal.reach[output], gain, fault, n.faults);
}

// A table of faults in which every outcome occurs.
inline correctnet::Faults some_faults(bool sign, float gain = 0) {
  return {true,
          {-1, 300000000, 700000000, 1000000000, 1400000000},
          {1, 0, 0, 0, 0.5f, 1},
          {0, 0, 1, -1, 0.5f, 0},
          sign ? 0x80000000u : 0,
          gain,
          2 * gain};
}

// Spreads of `count` weights, of which some are exact, and some spared by faults.
inline std::vector<float> random_spread(size_t count, unsigned seed = 5) {
  std::mt19937 random(seed);
  std::vector<float> spread(count);
  for (float& s : spread) s = random() % 8 == 0 ? 0.0f : random() % 8 == 1 ? -0.0f : float(random() % 1000 + 1) / 2000;
  return spread;
}

// The kinds of noise that read arrays, with and without faults.
inline std::vector<correctnet::Noise> array_noises(uint32_t layer) {
  std::vector<correctnet::Noise> all;
  for (const correctnet::Faults& faults :
       {correctnet::Faults{}, some_faults(true), some_faults(false), some_faults(true, 0.03f)}) {
    all.push_back(correctnet::gaussian_noise(layer, faults));
    all.push_back(correctnet::spread_noise(layer, 0.5, -0.125, faults));
  }
  return all;
}

// Gives a layer noise, with the arrays that it reads.
inline void set_noise(correctnet::Conv& conv, const correctnet::Noise& noise) {
  conv.noise = noise;
  const bool reads = noise.kind != correctnet::NoiseKind::factor;
  conv.spread = reads ? random_spread(conv.weight.size()) : std::vector<float>{};
  conv.reach.clear();
  for (int i = 0; reads && noise.faults.any && i < conv.outputs; ++i) conv.reach.push_back(0.5f + 0.25f * float(i));
}

// The weights of a layer on a chip, one at a time, by the scalar code.
inline std::vector<float> noisy_weights(const std::vector<float>& weight, const correctnet::Noise& layer, uint64_t seed,
                                        uint32_t sample, const std::vector<float>& spread = {},
                                        const std::vector<float>& reach = {}) {
  const correctnet::Noise n = correctnet::noise::on_chip(layer, seed, sample);
  const int64_t row = reach.empty() ? 0 : int64_t(weight.size() / reach.size());
  const correctnet::Nominal nominal{weight.data(), spread.data(), reach.data(), row};
  std::vector<float> noisy(weight.size());
  for (size_t i = 0; i < noisy.size(); ++i) noisy[i] = one_weight(nominal, n, int64_t(i));
  return noisy;
}

inline std::vector<float> noisy_weights(const correctnet::Conv& conv, uint64_t seed, uint32_t sample) {
  return noisy_weights(conv.weight, *conv.noise, seed, sample, conv.spread, conv.reach);
}

inline specification::Tensor random_images(correctnet::Shape shape, int count, unsigned seed = 9) {
  specification::Tensor x(shape, count);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& f : x.data) f = normal(random);
  return x;
}

// Sets everything but channels and weights from a test case.
template <class Case>
void set_geometry(correctnet::Conv& conv, const Case& c) {
  conv.kernel_h = c.kernel_h;
  conv.kernel_w = c.kernel_w;
  conv.stride_h = conv.stride_w = c.stride;
  conv.padding_h = conv.padding_w = c.padding;
  conv.dilation_h = conv.dilation_w = c.dilation;
  conv.groups = c.groups;
  conv.pool = c.pool;
}

struct How {
  int threads = 1, chunk_blocks = 0;
  size_t keep_bytes = 64 << 20;
};

// A run that computes nothing yet: outputs or counts are to be set.
inline correctnet::Run run_of(const specification::Tensor& images, uint64_t seed, const std::vector<uint32_t>& samples,
                              How how = {}) {
  correctnet::Run run;
  run.images = images.data.data();
  run.count = images.count;
  run.seed = seed;
  run.samples = samples;
  run.threads = how.threads;
  run.chunk_blocks = how.chunk_blocks;
  run.keep_bytes = how.keep_bytes;
  return run;
}

// `out` is the shape of the plan's output.
inline std::vector<float> outputs_of(const correctnet::Plan& plan, correctnet::Shape out,
                                     const specification::Tensor& images, uint64_t seed,
                                     const std::vector<uint32_t>& samples, How how = {}) {
  std::vector<float> outputs(samples.size() * images.count * out.channels * out.height * out.width);
  correctnet::Run run = run_of(images, seed, samples, how);
  run.outputs = outputs.data();
  plan.run(run);
  return outputs;
}
