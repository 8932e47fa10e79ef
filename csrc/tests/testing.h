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

// The weights of a layer on a chip, one at a time, by the scalar code.
inline std::vector<float> noisy_weights(const std::vector<float>& weight, const correctnet::Noise& layer, uint64_t seed,
                                        uint32_t sample) {
  namespace noise = correctnet::noise;
  const correctnet::Noise n = noise::on_chip(layer, seed, sample);
  std::vector<float> noisy(weight.size());
  for (size_t i = 0; i < noisy.size(); ++i) {
    const uint32_t word = noise::words(n, uint32_t(i / 4)).word[i % 4];
    noisy[i] = noise::multiply(weight[i], noise::lognormal(word, n, noise::kNormal));
  }
  return noisy;
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
