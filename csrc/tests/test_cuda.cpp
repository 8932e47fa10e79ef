// The CUDA kernels compiled as C++ and run on a modelled device (cuda/model/shim.h), against the scalar noise, plain
// loops in float64 and the CPU's engine. Small integers and one-hot images make comparisons exact wherever sums could
// hide an error.
//
//   cmake --preset release -DCORRECTNET_CUDA=SHIM -S csrc && cmake --build build/release && build/release/tests/test_cuda
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/engine.h"
#include "networks.h"
#include "specification.h"
#include "testing.h"

using namespace correctnet;
using specification::Tensor;

namespace {

constexpr uint64_t kSeed = 0xfedcba9876543210;
float rounded(Type type, float a) { return type == Type::float32 ? a : bfloat16(a); }

cuda::Chips chips_of(const std::vector<uint32_t>& samples) {
  return {&kSeed, samples.data(), int64_t(samples.size())};
}

struct DeviceHow {
  bool materialise = false;
  int64_t together = 0;  // samples; 0: all
};

std::vector<float> device_outputs(const Plan& plan, const Tensor& images, const std::vector<uint32_t>& samples,
                                  DeviceHow how = {}) {
  const cuda::Engine engine(plan, 0);
  const Shape out = engine.output();
  std::vector<float> outputs(samples.size() * images.count * out.channels * out.height * out.width, NAN);
  const int64_t together = how.together ? how.together : int64_t(samples.size());
  std::vector<char> workspace(engine.workspace(images.count, together, how.materialise) + 256, char(0xff));
  char* const aligned = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256);
  cuda::DeviceRun run = {images.data.data(), images.count, chips_of(samples)};
  run.outputs = outputs.data();
  run.workspace = aligned;
  run.workspace_bytes = workspace.size() - 256;
  run.materialise = how.materialise;
  engine.run(run);
  return outputs;
}

Tensor rounded_images(Shape shape, int count, unsigned seed = 1) {
  Tensor x = random_images(shape, count, seed);
  for (float& f : x.data) f = bfloat16(f);
  return x;
}

// ---- the model of the device ----------------------------------------------------------------------------------------

// Where the elements of mma.m16n8k16's operands are, from the PTX ISA's section on it, "Fragments for .bf16": element i
// of a lane's a0..a7, b0..b3 and c0..c3, with groupID = lane / 4 and threadID_in_group = lane % 4.
struct MmaArguments {
  const float *a, *b;  // 16 x 16 and 16 x 8, row by row
  float* c;            // 16 x 8
};

void mma_by_the_tables(const MmaArguments p) {
  const int lane = int(threadIdx.x), group = lane / 4, in_group = lane % 4;
  uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a[i / 2] |= uint32_t(noise::bfloat16(p.a[row * 16 + col])) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), col = group;
    b[i / 2] |= uint32_t(noise::bfloat16(p.b[row * 8 + col])) << 16 * (i % 2);
  }
  float c[4] = {};
  cuda::mma(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}

// ldmatrix .x4 .b16, from the same document, "ldmatrix": lanes 8 i ... 8 i + 7 give the addresses of the rows of matrix
// i, and a lane receives of each matrix the elements 2 (lane % 4) and the next of row lane / 4, the first in the low
// half.
struct LoadArguments {
  const int* order;    // where row r of the 32 is in memory
  uint16_t* received;  // (lane, matrix, 2)
};

void load_matrices(const LoadArguments p) {
  const int lane = int(threadIdx.x);
  uint16_t* const rows = reinterpret_cast<uint16_t*>(cuda::shared_memory());
  for (int j = 0; j < 8; ++j) rows[8 * p.order[lane] + j] = uint16_t(100 * lane + j);  // row `lane`, element j
  cuda::__syncthreads();
  uint32_t matrix[4];
  cuda::ldmatrix(matrix, rows + 8 * p.order[lane]);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) p.received[(lane * 4 + i) * 2 + j] = uint16_t(matrix[i] >> 16 * j);
}

void test_matrix_rows() {
  std::vector<int> order(32);
  for (int i = 0; i < 32; ++i) order[i] = 11 * i % 32;  // rows may be anywhere
  std::vector<uint16_t> received(32 * 8);
  cuda::launch(load_matrices, {1, 1, 1}, 32, 512, nullptr, LoadArguments{order.data(), received.data()});
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        const int row = 8 * i + lane / 4, element = 2 * (lane % 4) + j, got = received[(lane * 4 + i) * 2 + j];
        CHECK(got == 100 * row + element, "ldmatrix: lane %d, matrix %d, number %d is %d", lane, i, j, got);
      }
}

void test_fragments() {
  std::vector<float> a(256), b(128), c(128, NAN);
  std::mt19937 random(3);
  for (float& f : a) f = float(int(random() % 9) - 4);
  for (float& f : b) f = float(int(random() % 9) - 4);
  cuda::launch(mma_by_the_tables, {1, 1, 1}, 32, 0, nullptr, MmaArguments{a.data(), b.data(), c.data()});
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[k * 8 + j];
      CHECK(c[i * 8 + j] == sum, "mma: c[%d][%d] is %g, not %g", i, j, c[i * 8 + j], sum);
    }
}

// The model stops at misaligned addresses, as a GPU does; in a process of its own each.
struct MisalignedArguments {
  const char* from;
  int what;
};

void misaligned(const MisalignedArguments p) {
  char* const shared = cuda::shared_memory();
  uint32_t matrix[4];
  switch (p.what) {
    case 0: cuda::vector_at<float4>(p.from + 4); break;
    case 1: cuda::vector_at<float4>(shared + 8); break;
    case 2: cuda::vector_at<uint2>(p.from + 4); break;
    case 3: cuda::ldmatrix(matrix, shared + 8); break;
    case 4: cuda::cp_async<16>(shared, p.from + 4, true); break;
    case 5: cuda::cp_async<8>(shared + 4, p.from, true); break;
    default: cuda::vector_at<float4>(p.from + 16);
  }
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
}

void test_misaligned() {
  alignas(16) static const char memory[64] = {};
  for (int what = 0; what < 7; ++what) {
    const pid_t child = fork();
    if (!child) {
      std::signal(SIGABRT, SIG_DFL);
      cuda::launch(misaligned, {1, 1, 1}, 32, 64, nullptr, MisalignedArguments{memory, what});
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    const bool stopped = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
    CHECK(stopped == (what < 6), "misaligned access %d: status %d", what, status);
  }
}

// ---- noise ----------------------------------------------------------------------------------------------------------

struct Size {
  int rows, taps, channels;
};

void check_noisy_weights(Size s, bool channels_last, Type type, const std::vector<uint32_t>& samples,
                         const Noise& noise = lognormal_noise(7, 0.5, -0.125)) {
  const size_t size = size_t(s.rows) * s.taps * s.channels;
  Conv conv;
  conv.outputs = s.rows;
  conv.weight = RandomLayers(0.5).normal(size, 1);
  set_noise(conv, noise);
  const std::vector<float>& weight = conv.weight;
  std::vector<float> floats(size * samples.size());
  std::vector<uint16_t> halves(size * samples.size());
  std::vector<float> stored = weight;
  const auto place = [&](size_t e) {  // of an element in memory
    const size_t channel = e % s.channels, tap = e / s.channels % s.taps, row = e / s.channels / s.taps;
    return channels_last ? e : (row * s.channels + channel) * s.taps + tap;
  };
  for (size_t e = 0; e < size; ++e) stored[place(e)] = weight[e];
  void* const out = type == Type::float32 ? static_cast<void*>(floats.data()) : halves.data();
  cuda::noisy_weight({stored.data(), out, type == Type::bfloat16, {s.rows, s.taps, s.channels, channels_last},
                      chips_of(samples), noise, 0, nullptr, conv.spread.data(), conv.reach.data()});
  int wrong = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const std::vector<float> wanted = noisy_weights(conv, kSeed, samples[i]);
    for (size_t e = 0; e < size; ++e) {
      const size_t at = i * size + place(e);
      const float got = type == Type::float32 ? floats[at] : noise::from_bits(uint32_t(halves[at]) << 16);
      wrong += noise::bits(got) != noise::bits(rounded(type, wanted[e]));
    }
  }
  CHECK(wrong == 0, "%d x %d x %d, channels last %d, %s: %d weights differ", s.rows, s.taps, s.channels, channels_last,
        name(type), wrong);
}

void test_noisy_weights(bool few) {
  const std::vector<uint32_t> samples = {0, 137, 4000000000u};
  for (const Size s : {Size{6, 25, 1}, Size{16, 25, 6}, Size{3, 9, 67}, Size{5, 1, 16}, Size{1, 1, 1}, Size{2, 70, 130}}) {
    if (few && s.channels != 6) continue;
    for (const bool channels_last : {true, false})
      for (const Type type : {Type::float32, Type::bfloat16}) check_noisy_weights(s, channels_last, type, samples);
    for (const Noise& noise : array_noises(7))
      for (const Type type : {Type::float32, Type::bfloat16}) check_noisy_weights(s, true, type, samples, noise);
  }
}

// ---- convolution ----------------------------------------------------------------------------------------------------

struct Case {
  int channels, height, width, outputs, kernel_h, kernel_w, stride, padding, dilation, groups, images;
  bool pool;
};

const Case kCases[] = {
    {1, 9, 9, 6, 5, 5, 1, 0, 1, 1, 1, false},      {1, 12, 12, 6, 5, 5, 1, 0, 1, 1, 3, true},
    {3, 8, 8, 10, 3, 3, 1, 1, 1, 1, 5, false},     {5, 7, 9, 17, 3, 3, 2, 1, 1, 1, 2, false},
    {6, 11, 11, 16, 5, 5, 1, 0, 1, 1, 3, true},    {8, 6, 6, 70, 3, 3, 1, 1, 1, 1, 9, true},
    {16, 5, 5, 100, 3, 3, 1, 2, 2, 1, 4, false},   {12, 6, 5, 8, 3, 1, 1, 1, 1, 4, 3, false},
    {9, 4, 4, 6, 1, 1, 1, 0, 1, 3, 7, false},      {130, 1, 1, 84, 1, 1, 1, 0, 1, 1, 19, false},
    {400, 1, 1, 120, 1, 1, 1, 0, 1, 1, 2, false},  {84, 1, 1, 10, 1, 1, 1, 0, 1, 1, 260, false},
    {2, 3, 3, 1, 3, 3, 1, 1, 1, 1, 1, false},      {64, 4, 4, 64, 3, 3, 1, 1, 1, 1, 20, true},
    {7, 13, 6, 33, 4, 2, 3, 2, 1, 1, 2, false},
};

Conv make_conv(const Case& c, bool noisy) {
  RandomLayers random(0.5, BatchNorm::after);
  Conv conv = random.conv(c.channels / c.groups, c.outputs, 1);
  set_geometry(conv, c);
  conv.weight = random.normal(size_t(c.outputs) * c.kernel_h * c.kernel_w * c.channels / c.groups, 1);
  conv.pointwise.scale = random.normal(c.outputs, 1);  // some are negative, so the pool must come after them
  conv.noise.reset();
  if (noisy) conv.noise = lognormal_noise(7, 0.5, -0.125);
  return conv;
}

// A one-hot image of the kernel's size gives back the weight that meets its place, bit for bit.
void check_identity(const Case& c, Type type, DeviceHow how, const Noise& noise = lognormal_noise(7, 0.5, -0.125)) {
  Conv conv = make_conv(c, true);
  set_noise(conv, noise);
  conv.stride_h = conv.stride_w = conv.dilation_h = conv.dilation_w = 1;
  conv.padding_h = conv.padding_w = 0;
  conv.pool = false;
  conv.pointwise = {};
  const Shape in = {c.channels, c.kernel_h, c.kernel_w};
  const int places = in.channels * in.height * in.width;
  Tensor x(in, places);
  for (int i = 0; i < places; ++i) x.data[size_t(i) * places + i] = 1;
  Plan plan(type, kernels_portable, in);
  const int first = plan.conv(plan.input(), conv);
  plan.finish(first);
  const std::vector<uint32_t> samples = {0, 4000000000u, 12};
  const std::vector<float> got = device_outputs(plan, x, samples, how);
  int wrong = 0;
  const int inputs = c.channels / c.groups, outputs = c.outputs / c.groups;
  for (size_t s = 0; s < samples.size(); ++s) {
    const std::vector<float> weight = noisy_weights(conv, kSeed, samples[s]);
    for (int i = 0; i < places; ++i)
      for (int o = 0; o < c.outputs; ++o) {
        const int channel = i / (in.height * in.width), tap = i % (in.height * in.width);
        const bool same = channel / inputs == o / outputs;
        const float wanted =
            same ? rounded(type, weight[(size_t(o) * in.height * in.width + tap) * inputs + channel % inputs]) : 0;
        wrong += got[(s * places + i) * c.outputs + o] != wanted;
      }
  }
  CHECK(wrong == 0, "identity, %d channels, kernel %d x %d, %d outputs, %s, materialise %d: %d weights differ", c.channels,
        c.kernel_h, c.kernel_w, c.outputs, name(type), how.materialise, wrong);
}

// Against the specification in float64, with the weights of the scalar code.
void check_conv(const Case& c, Type type, bool noisy, DeviceHow how) {
  const Shape in = {c.channels, c.height, c.width};
  const Conv conv = make_conv(c, noisy);
  const Tensor x = rounded_images(in, c.images);
  Plan plan(type, kernels_portable, in);
  plan.finish(plan.conv(plan.input(), conv));
  const std::vector<uint32_t> samples = noisy ? std::vector<uint32_t>{5, 137} : std::vector<uint32_t>{5};
  const std::vector<float> got = device_outputs(plan, x, samples, how);
  double worst = 0, largest = 0;
  size_t at = 0;
  for (uint32_t sample : samples) {
    Conv own = conv;
    if (noisy) own.weight = noisy_weights(conv.weight, *conv.noise, kSeed, sample);
    for (float& w : own.weight) w = rounded(type, w);
    for (float wanted : specification::conv<double>(x, own).data) {
      // A NaN must not be lost in a maximum.
      const double error = std::fabs(double(got[at++]) - wanted);
      worst = error <= worst ? worst : error;
      largest = std::max(largest, std::fabs(double(wanted)));
    }
  }
  CHECK(at == got.size(), "conv: %zu outputs instead of %zu", got.size(), at);
  // Sums are float32 in both types and the output is, too: products of bfloat16 numbers are exact.
  CHECK(worst <= 4e-6 * largest, "conv, %d channels, %d x %d, kernel %d x %d, %d outputs, %s, noisy %d: error %g of %g",
        c.channels, c.height, c.width, c.kernel_h, c.kernel_w, c.outputs, name(type), noisy, worst, largest);
}

// Whole numbers, of which many sums lie between two steps of a converter: equal to the specification.
void check_converters(const Case& c, Type type) {
  std::mt19937 random(c.outputs);
  const auto integers = [&](std::vector<float>& v, int limit) {
    for (float& f : v) f = float(int(random() % (2 * limit + 1)) - limit);
  };
  Conv conv = make_conv(c, false);
  integers(conv.weight, 3);
  conv.pointwise = {};
  conv.pointwise.adc = {0.5f, float(1 + random() % 60)};
  conv.pointwise.scale.resize(c.outputs);
  integers(conv.pointwise.scale, 2);
  conv.pointwise.dac = {0.25f, float(1 + random() % 9)};
  Pointwise again;
  again.adc = {0.5f, 3};
  Tensor x({c.channels, c.height, c.width}, c.images);
  integers(x.data, 4);
  Plan plan(type, kernels_portable, x.shape);
  plan.finish(plan.pointwise(plan.conv(plan.input(), conv), again));
  const std::vector<float> got = device_outputs(plan, x, {0}, {false});
  const Tensor wanted = specification::conv<double>(x, conv);
  int wrong = got.size() != wanted.data.size();
  for (size_t i = 0; i < got.size() && !wrong; ++i)
    wrong += got[i] != float(specification::converted(again.adc, wanted.data[i]));
  CHECK(wrong == 0, "converters, %d channels, %d outputs, %s: %d outputs differ", c.channels, c.outputs, name(type), wrong);
}

// dX against its definition in float64.
void check_backward(const Case& c, Type type, bool channels_last) {
  const Conv conv = make_conv(c, true);
  const int out_h = specification::output_size(c.height, c.kernel_h, c.stride, c.padding, c.dilation);
  const int out_w = specification::output_size(c.width, c.kernel_w, c.stride, c.padding, c.dilation);
  const int inputs = c.channels / c.groups, outputs = c.outputs / c.groups, taps = c.kernel_h * c.kernel_w;
  const std::vector<uint32_t> samples = {5, 137};
  const size_t x_size = size_t(c.images) * c.height * c.width * c.channels;
  const size_t y_size = size_t(c.images) * out_h * out_w * c.outputs;
  std::vector<float> gradient(samples.size() * y_size);
  std::mt19937 random(9);
  for (float& f : gradient) f = float(int(random() % 9) - 4);  // exact in bfloat16
  std::vector<uint16_t> half(gradient.size()), half_x(samples.size() * x_size);
  for (size_t i = 0; i < half.size(); ++i) half[i] = noise::bfloat16(gradient[i]);
  std::vector<float> found(samples.size() * x_size, NAN), stored = conv.weight;
  if (!channels_last)
    for (size_t e = 0; e < stored.size(); ++e) {
      const size_t channel = e % inputs, tap = e / inputs % taps, row = e / inputs / taps;
      stored[(row * inputs + channel) * taps + tap] = conv.weight[e];
    }
  cuda::LayerRun run = {};
  run.type = type;
  run.x = type == Type::float32 ? static_cast<void*>(gradient.data()) : half.data();
  run.weight = stored.data();
  run.channels_last = channels_last;
  run.y = type == Type::float32 ? static_cast<void*>(found.data()) : half_x.data();
  run.images = c.images;
  run.channels = c.channels, run.outputs = c.outputs, run.in_h = c.height, run.in_w = c.width;
  run.kernel_h = c.kernel_h, run.kernel_w = c.kernel_w, run.stride_h = run.stride_w = c.stride;
  run.padding_h = run.padding_w = c.padding, run.dilation_h = run.dilation_w = c.dilation, run.groups = c.groups;
  run.chips = chips_of(samples);
  run.noise = *conv.noise;
  run.backward = true;
  cuda::convolve(run);
  if (type == Type::bfloat16)
    for (size_t i = 0; i < found.size(); ++i) found[i] = noise::from_bits(uint32_t(half_x[i]) << 16);

  double worst = 0, largest = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    std::vector<double> wanted(x_size);
    std::vector<float> weight = noisy_weights(conv.weight, *conv.noise, kSeed, samples[s]);
    for (float& w : weight) w = rounded(type, w);
    for (int n = 0; n < c.images; ++n)
      for (int i = 0; i < out_h; ++i)
        for (int j = 0; j < out_w; ++j)
          for (int o = 0; o < c.outputs; ++o)
            for (int ky = 0; ky < c.kernel_h; ++ky)
              for (int kx = 0; kx < c.kernel_w; ++kx) {
                const int h = i * c.stride - c.padding + ky * c.dilation, w = j * c.stride - c.padding + kx * c.dilation;
                if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
                const double g = gradient[s * y_size + ((size_t(n) * out_h + i) * out_w + j) * c.outputs + o];
                for (int k = 0; k < inputs; ++k)
                  wanted[((size_t(n) * c.height + h) * c.width + w) * c.channels + o / outputs * inputs + k] +=
                      g * weight[(size_t(o) * taps + ky * c.kernel_w + kx) * inputs + k];
              }
    for (size_t i = 0; i < x_size; ++i) {
      const double error = std::fabs(found[s * x_size + i] - wanted[i]);
      worst = error <= worst ? worst : error;
      largest = std::max(largest, std::fabs(wanted[i]));
    }
  }
  const double tolerance = type == Type::float32 ? 4e-6 : 0x1p-8;  // bfloat16: of the result's rounding
  CHECK(worst <= tolerance * largest, "dX, %d channels, %d outputs, kernel %d x %d, stride %d, %s: error %g of %g", c.channels,
        c.outputs, c.kernel_h, c.kernel_w, c.stride, name(type), worst, largest);
}

// ---- networks -------------------------------------------------------------------------------------------------------

// A shortcut, pools of all kinds, a value that is the same on all chips and one that no group of four channels divides.
int mixed(Plan& plan) {
  RandomLayers random(0.5);
  const int x = plan.input();
  Conv first = random.conv(3, 6, 3, 1);
  first.noise.reset();  // computed once
  const int a = plan.conv(x, first);
  const int b = plan.conv(a, random.conv(6, 6, 3, 1));
  Pointwise relu;
  relu.activation = Activation::relu;
  const int sum = plan.add(a, b, relu);
  const int pooled = plan.max_pool(sum, {3, 3, 2, 2, 1, 1}), mean = plan.average_pool(sum, {3, 3, 2, 2, 1, 1});
  const int both = plan.concat({pooled, mean, plan.adaptive_average_pool(a, plan.shape(mean).height, plan.shape(mean).width)});
  return plan.linear(plan.pointwise(both, relu), random.linear(plan.shape(both).channels * plan.shape(both).height *
                                                                plan.shape(both).width, 10, true));
}

template <class Net>
void check_network(const char* what, Shape in, int images, Type type, const Net& net) {
  Plan plan(type, kernels(supported_isas().back()), in);
  const int last = net(plan);
  plan.finish(last);
  const Shape out = plan.shape(last);
  const Tensor x = rounded_images(in, images, 4);
  const std::vector<uint32_t> samples = {130, 131, 137, 4000000000u, 2};
  const std::vector<float> wanted = outputs_of(plan, out, x, kSeed, samples), got = device_outputs(plan, x, samples);
  double worst = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(double(got[i]) - wanted[i]);
    worst = error <= worst ? worst : error;
    largest = std::max(largest, std::fabs(double(wanted[i])));
  }
  // bfloat16: sums in another order may be rounded to the neighbouring number, 2^-8 away, in every layer.
  const double tolerance = type == Type::float32 ? 1e-5 : 0.04;
  CHECK(worst <= tolerance * largest, "%s, %s: error %g of %g", what, name(type), worst, largest);

  const auto same = [&](const std::vector<float>& other, const char* how) {
    CHECK(other == got, "%s, %s: %s gives other bits", what, name(type), how);
  };
  same(device_outputs(plan, x, samples, {true}), "materialised weights");
  same(device_outputs(plan, x, samples, {false, 2}), "two samples at a time");
  same(device_outputs(plan, x, samples, {true, 1}), "one sample at a time");
  const std::vector<float> alone = device_outputs(plan, x, {137});
  const size_t size = got.size() / samples.size();
  CHECK(std::vector<float>(got.begin() + 2 * size, got.begin() + 3 * size) == alone, "%s, %s: chip 137 alone differs", what,
        name(type));

  std::vector<int64_t> labels(images), correct(samples.size(), -1), expected(samples.size());
  for (int i = 0; i < images; ++i) labels[i] = i % out.channels;
  for (size_t s = 0; s < samples.size(); ++s)
    for (int i = 0; i < images; ++i) {
      const auto begin = got.begin() + (s * images + i) * out.channels;
      expected[s] += std::max_element(begin, begin + out.channels) - begin == labels[i];
    }
  const cuda::Engine engine(plan, 0);
  std::vector<char> workspace(engine.workspace(images, 3, false) + 256);
  cuda::DeviceRun run = {x.data.data(), images, chips_of(samples)};
  run.labels = labels.data();
  run.correct = correct.data();
  run.workspace = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256);
  run.workspace_bytes = workspace.size() - 256;
  engine.run(run);
  CHECK(correct == expected, "%s, %s: counts differ from those of the outputs", what, name(type));
}

// NaN and infinity, which every pool meets: of the same kind as on the CPU, and counted.
void test_nonfinite(Type type) {
  Tensor x = rounded_images({3, 12, 12}, 6, 4);
  x.at(1, 0, 5, 6) = NAN;
  x.at(2, 1, 6, 6) = INFINITY;
  x.at(4, 2, 0, 11) = -INFINITY;
  RandomLayers random(0.5);
  Plan plan(type, kernels(supported_isas().back()), x.shape);
  Conv first = random.conv(3, 6, 3, 1), second = random.conv(6, 8, 3, 1);
  first.pool = true;
  const int a = plan.conv(plan.input(), first), b = plan.max_pool(plan.conv(a, second), {3, 3, 2, 2, 1, 1});
  plan.finish(plan.linear(b, random.linear(72, 5, true)));
  const std::vector<uint32_t> samples = {130, 131};
  const std::vector<float> wanted = outputs_of(plan, {5, 1, 1}, x, kSeed, samples), got = device_outputs(plan, x, samples);
  for (size_t i = 0; i < got.size(); ++i)
    CHECK(std::isnan(got[i]) == std::isnan(wanted[i]) && std::isinf(got[i]) == std::isinf(wanted[i]),
          "%s: output %zu is %g, not %g", name(type), i, double(got[i]), double(wanted[i]));
  std::vector<int64_t> labels(6), correct(2, -1), nonfinite(2, -1), right(2), odd(2);
  for (int s = 0; s < 2; ++s)
    for (int n = 0; n < 6; ++n) {
      const float* logits = &got[(s * 6 + n) * 5];
      if (s == 0) labels[n] = std::max_element(logits, logits + 5) - logits;
      const bool nan = std::any_of(logits, logits + 5, [](float f) { return std::isnan(f); });
      right[s] += !nan && std::max_element(logits, logits + 5) - logits == labels[n];
      odd[s] += std::any_of(logits, logits + 5, [](float f) { return !std::isfinite(f); });
    }
  const cuda::Engine engine(plan, 0);
  std::vector<char> workspace(engine.workspace(6, 2, false) + 256);
  cuda::DeviceRun run = {x.data.data(), 6, chips_of(samples)};
  run.labels = labels.data();
  run.correct = correct.data();
  run.nonfinite = nonfinite.data();
  run.workspace = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256);
  run.workspace_bytes = workspace.size() - 256;
  engine.run(run);
  CHECK(correct == right && nonfinite == odd && odd[0] >= 2 && right[0] >= 3, "%s: %d and %d instead of %d and %d",
        name(type), int(correct[0]), int(nonfinite[0]), int(right[0]), int(odd[0]));
}

// ---- mistakes -------------------------------------------------------------------------------------------------------

template <class Work>
void refuses(const char* what, const Work& work) {
  try {
    work();
  } catch (const std::invalid_argument&) {
    return;
  }
  CHECK(false, "%s is not refused", what);
}

void test_mistakes() {
  Plan open(Type::float32, kernels_portable, {1, 4, 4});
  refuses("a plan that is not finished", [&] { cuda::Engine engine(open, 0); });
  Plan plan(Type::float32, kernels_portable, {2, 3, 3});
  plan.finish(plan.conv(plan.input(), make_conv(kCases[12], true)));
  const cuda::Engine engine(plan, 0);
  refuses("no images", [&] { engine.workspace(0, 1, false); });
  refuses("no samples", [&] { engine.workspace(1, 0, false); });
  const Tensor x({2, 3, 3}, 1);
  const uint32_t sample = 0;
  float outputs[9];
  std::vector<char> workspace(engine.workspace(1, 1, false));
  cuda::DeviceRun run = {x.data.data(), 1, {&kSeed, &sample, 1}};
  run.outputs = outputs;
  run.workspace = workspace.data();
  run.workspace_bytes = workspace.size() - 1;
  refuses("too small a workspace", [&] { engine.run(run); });
  run.workspace_bytes = workspace.size();
  int64_t labels = 0, correct = 0;
  run.labels = &labels;
  refuses("labels without counts", [&] { engine.run(run); });
  run.correct = &correct;
  refuses("counting maps instead of classes", [&] { engine.run(run); });
  run.labels = run.correct = nullptr;
  run.nonfinite = &correct;
  refuses("infinities without counts", [&] { engine.run(run); });
}

// ---- the runtime's limits and errors --------------------------------------------------------------------------------

// A layer with arbitrary tensors, 2 x 2 x 4 numbers in and out.
struct SmallLayer {
  static constexpr size_t kSize = 2 * 2 * 4, kSamples = 5;
  alignas(16) float x[kSize * kSamples + 4], weight[16], y[kSize * kSamples + 4];
  uint32_t samples[kSamples] = {3, 1, 4, 1, 5};
  cuda::LayerRun run = {};

  SmallLayer() {
    for (size_t i = 0; i < kSize * kSamples + 4; ++i) x[i] = float(int(i % 9) - 4), y[i] = NAN;
    for (int i = 0; i < 16; ++i) weight[i] = float(i - 7);
    run.type = Type::float32;
    run.x = x, run.weight = weight, run.y = y;
    run.channels_last = true;
    run.images = 1;
    run.channels = run.outputs = 4;
    run.in_h = run.in_w = 2;
    run.kernel_h = run.kernel_w = run.stride_h = run.stride_w = run.dilation_h = run.dilation_w = run.groups = 1;
    run.chips = {&kSeed, samples, kSamples};
    run.noise = lognormal_noise(7, 0.5, -0.125);
  }
  std::vector<float> outputs() {
    std::fill(y, y + kSize * kSamples, NAN);
    cuda::convolve(run);
    return std::vector<float>(y, y + kSize * kSamples);
  }
};

// The message of the error thrown by `work`.
template <class Error = std::runtime_error, class Work>
std::string error_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

void fails_next(const char* call, cudaError_t error) {
  shim_failing = call;
  shim_failure = error;
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// An error is thrown once and then cleared in the runtime.
void test_errors_do_not_stay() {
  SmallLayer layer;
  const std::vector<float> wanted = layer.outputs();
  const auto works = [&](const char* call) {
    CHECK(cudaPeekAtLastError() == cudaSuccess, "an error is left after %s", call);
    std::string error = error_of([&] { CHECK(layer.outputs() == wanted, "other outputs after %s", call); });
    CHECK(error == "no error", "after %s: %s", call, error.c_str());
  };
  for (const char* call : {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernel"}) {
    fails_next(call, cudaErrorInvalidValue);
    const std::string error = error_of([&] { layer.outputs(); });
    CHECK(contains(error, "CUDA, ") && !shim_failing, "%s that fails: %s", call, error.c_str());
    works(call);
  }
  // Errors of other code are not reported, and are not cleared.
  shim_last_error = cudaErrorInvalidConfiguration;
  const std::string error = error_of([&] { CHECK(layer.outputs() == wanted, "other outputs"); });
  CHECK(error == "no error", "an error of others: %s", error.c_str());
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration, "the error of others was taken");

  Plan plan(Type::float32, kernels_portable, {2, 3, 3});
  plan.finish(plan.conv(plan.input(), make_conv(kCases[12], true)));
  fails_next("cudaMalloc", cudaErrorMemoryAllocation);
  const std::string full = error_of<cuda::OutOfMemory>([&] { cuda::Engine engine(plan, 0); });
  CHECK(contains(full, "CUDA, copying a network"), "no memory for a network: %s", full.c_str());
  works("an allocation");
  CHECK(error_of([&] { cuda::Engine engine(plan, 0); }) == "no error", "an engine after one that found no memory");
}

void test_advice() {
  const auto problem = [](const char* call, cudaError_t error) {
    fails_next(call, error);
    const std::string why = cuda::problem(0);
    CHECK(cudaPeekAtLastError() == cudaSuccess && !shim_failing, "%s: the error is not cleared", call);
    return why;
  };
  for (const char* call : {"cudaGetDevice", "cudaSetDevice", "cudaFuncGetAttributes"}) {
    const std::string why = problem(call, cudaErrorInsufficientDriver);
    CHECK(contains(why, "update the driver") && contains(why, "CUDACXX"), "too old a driver: %s", why.c_str());
  }
  for (const auto error : {cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion, cudaErrorInvalidDeviceFunction}) {
    const std::string why = problem("cudaFuncGetAttributes", error);
    CHECK(contains(why, "CORRECTNET_CUDA_ARCHS=native"), "no code for this GPU: %s", why.c_str());
  }
  CHECK(cuda::problem(0).empty(), "a device that works has a problem: %s", cuda::problem(0).c_str());
  // The same advice if the error occurs later.
  SmallLayer layer;
  fails_next("cudaLaunchKernel", cudaErrorNoKernelImageForDevice);
  const std::string late = error_of([&] { layer.outputs(); });
  CHECK(contains(late, "CORRECTNET_CUDA_ARCHS=native"), "no code, at a launch: %s", late.c_str());
}

// Work runs on the named device, and the current device of the thread does not change.
void test_devices() {
  SmallLayer layer;
  const std::vector<float> wanted = layer.outputs();
  const auto done_on = [](int device, const char* what) {
    CHECK(shim_launched_on == device, "%s ran on device %d, not %d", what, shim_launched_on, device);
    CHECK(shim_device == 0, "%s leaves device %d current", what, shim_device);
  };
  done_on(0, "convolve");
  layer.run.device = 1;
  CHECK(layer.outputs() == wanted, "convolve: another device, other outputs");
  done_on(1, "convolve");
  cuda::NoisyWeights job = {nullptr, layer.y, false, {4, 1, 4, true}, {&kSeed, layer.samples, 2},
                            lognormal_noise(7, 0.5, 0), 1};
  shim_launched_on = 0;
  cuda::noisy_weight(job);
  done_on(1, "noisy_weight");
  CHECK(cuda::problem(1).empty() && shim_device == 0, "`problem` leaves device %d current", shim_device);
  CHECK(!cuda::problem(kShimDevices).empty() && shim_device == 0, "a device that is not there has no problem");
  job.device = layer.run.device = kShimDevices;
  CHECK(contains(error_of([&] { cuda::noisy_weight(job); }), "CUDA, device"), "noisy_weight on no device");
  CHECK(contains(error_of([&] { layer.outputs(); }), "CUDA, device"), "convolve on no device");
  CHECK(cudaPeekAtLastError() == cudaSuccess, "an error is left");
}

// More samples than a grid can count need several launches; no samples or no images need none.
void test_many_samples() {
  SmallLayer layer;
  const std::vector<float> wanted = layer.outputs();
  layer.run.x_shared = true;
  const std::vector<float> wanted_shared = layer.outputs();
  layer.run.x_shared = false;
  cuda::NoisyWeights job = {layer.weight, layer.y, false, {4, 1, 4, true}, {&kSeed, layer.samples, 5},
                            lognormal_noise(7, 0.5, 0)};
  cuda::noisy_weight(job);
  const std::vector<float> weights(layer.y, layer.y + 80);
  std::vector<uint16_t> half(80), half_again(80);
  job.bfloat16 = true, job.out = half.data();
  cuda::noisy_weight(job);

  shim_most_blocks = 2;
  CHECK(layer.outputs() == wanted, "convolve: two samples a launch give other outputs");
  layer.run.x_shared = true;
  CHECK(layer.outputs() == wanted_shared, "convolve, one x: two samples a launch give other outputs");
  job.out = half_again.data();
  cuda::noisy_weight(job);
  CHECK(half_again == half, "noisy_weight, bfloat16: two samples a launch give other weights");
  job.bfloat16 = false, job.out = layer.y;
  std::fill(layer.y, layer.y + 80, NAN);
  cuda::noisy_weight(job);
  CHECK(std::vector<float>(layer.y, layer.y + 80) == weights, "noisy_weight: two samples a launch give other weights");
  shim_most_blocks = 65535;

  job.chips.count = layer.run.chips.count = 0;
  CHECK(error_of([&] { cuda::noisy_weight(job); layer.outputs(); }) == "no error", "no samples are an error");
  job.chips.count = layer.run.chips.count = 5;
  job.shape.rows = layer.run.images = 0;
  CHECK(error_of([&] { cuda::noisy_weight(job); layer.outputs(); }) == "no error", "no weights or images are an error");
}

// The kernel's limit is the device's, never that of one launch: threads of the host share it.
void test_shared_memory_is_allowed_once() {
  SmallLayer layer;
  for (const int shared : {227 << 10, 80 << 10}) {
    shim_shared_bytes = shared;
    layer.outputs();
    CHECK(shim_launched_with == shared, "a block was allowed %d bytes, not %d", shim_launched_with, shared);
  }
}

void test_sizes() {
  SmallLayer layer;
  layer.run.x = layer.x + 2;
  refuses("an input that begins between multiples of 16 bytes", [&] { cuda::convolve(layer.run); });
  layer.run.x = layer.x;
  layer.run.weight = layer.weight + 1;
  refuses("weights that begin between multiples of 16 bytes", [&] { cuda::convolve(layer.run); });
  layer.run.weight = layer.weight;
  layer.run.y = layer.y + 2;
  refuses("an output that begins between multiples of 16 bytes", [&] { cuda::convolve(layer.run); });
  layer.run.y = layer.y;
  // 2^32 pixels of the input, 2^30 of the output; and the other way round.
  layer.run.images = 1 << 20;
  layer.run.in_h = layer.run.in_w = 64;
  layer.run.stride_h = layer.run.stride_w = 2;
  refuses("an input of 2^32 pixels", [&] { cuda::convolve(layer.run); });
  layer.run.backward = true;
  refuses("a gradient of 2^32 pixels", [&] { cuda::convolve(layer.run); });
}

}  // namespace

// The kernels with barriers, on a tile or two each: 256 system threads that wait for each other are slow.
void look_for_races() {
  const Case small = {3, 8, 8, 10, 3, 3, 1, 1, 1, 1, 5, false}, sliced = {40, 3, 3, 20, 3, 3, 1, 1, 1, 1, 2, false},
             wide = {1, 9, 9, 6, 5, 5, 1, 0, 1, 1, 1, false}, strided = {5, 7, 5, 17, 3, 3, 2, 1, 1, 1, 1, false},
             grouped = {4, 4, 4, 4, 3, 1, 1, 1, 1, 2, 1, false};
  for (const Type type : {Type::float32, Type::bfloat16}) {
    shim_shared_bytes = 227 << 10;
    check_conv(small, type, true, {false});
    check_conv(wide, type, true, {false});
    check_conv(strided, type, true, {false});
    check_conv(grouped, type, true, {false});
    check_backward(strided, type, type == Type::float32);
    check_noisy_weights({2, 9, 7}, type == Type::float32, type, {0, 137});
    check_noisy_weights({2, 9, 7}, false, type, {137});
    shim_shared_bytes = 70 << 10;
    check_conv(sliced, type, true, {true});
  }
}

// Without arguments everything; "few": what mutants are tried on; "races".
int main(int argc, char** argv) {
  const bool few = argc > 1;
  if (few && std::string(argv[1]) == "races") {
    look_for_races();
    return report();
  }
  test_fragments();
  test_matrix_rows();
  test_noisy_weights(few);
  // The larger memory holds all weights of a tile, the smaller one forces slices through it.
  for (const int shared : {227 << 10, 80 << 10}) {
    shim_shared_bytes = shared;
    int number = 0;
    for (const Case& c : kCases) {
      if (++number % (few ? 5 : shared < (100 << 10) ? 3 : 1)) continue;
      for (const Type type : {Type::float32, Type::bfloat16}) {
        check_identity(c, type, {false});
        check_conv(c, type, true, {false});
        check_converters(c, type);
        if (few) continue;
        check_identity(c, type, {true});
        if (number % 4 == 1)
          for (const Noise& noise : array_noises(7)) check_identity(c, type, {false}, noise);
        check_conv(c, type, false, {false});
        check_conv(c, type, true, {true});
        check_backward(c, type, true);
        check_backward(c, type, false);
      }
    }
  }
  for (const Type type : {Type::float32, Type::bfloat16}) {
    check_network("mixed", {3, 7, 7}, 3, type, [](Plan& p) { return mixed(p); });
    test_nonfinite(type);
    if (few) continue;
    check_network("LeNet-5", {1, 32, 32}, 2, type, [](Plan& p) { return lenet5(p, 0.5); });
    check_network("VGG16, an eighth", {3, 32, 32}, 1, type,
                  [](Plan& p) { return vgg16(p, 0.5, BatchNorm::before, 8, 2, 5); });
  }
  test_mistakes();
  if (!few) {
    test_misaligned();
    test_sizes();
    test_errors_do_not_stay();
    test_advice();
    test_devices();
    test_many_samples();
    test_shared_memory_is_allowed_once();
  }
  return report();
}
