// Every operation on every instruction set that this machine has, against its specification. Small integers make the
// comparison exact: products and sums are integers that float32 holds, so that their order does not matter.
//
//   cmake --preset release -S csrc && cmake --build build/release && build/release/tests/test_lanes
#include <cmath>
#include <cstdio>
#include <random>
#include <string>

#include "specification.h"
#include "testing.h"

using namespace correctnet;
using specification::Tensor;

namespace {

struct Case {
  int count;  // images
  Shape in;
  int outputs, kernel_h, kernel_w, stride, padding, dilation, groups;
  bool pool;
};

std::string describe(const Case& c) {
  char text[200];
  snprintf(text, sizeof text, "%d images %dx%dx%d, %d outputs, %dx%d, stride %d, padding %d, dilation %d, groups %d%s",
           c.count, c.in.channels, c.in.height, c.in.width, c.outputs, c.kernel_h, c.kernel_w, c.stride, c.padding,
           c.dilation, c.groups, c.pool ? ", pool" : "");
  return text;
}

std::vector<float> integers(std::mt19937& random, size_t n, int limit) {
  std::vector<float> v(n);
  for (float& f : v) f = float(int(random() % (2 * limit + 1)) - limit);
  return v;
}

Conv conv_of(const Case& c, std::mt19937& random) {
  Conv conv;
  conv.outputs = c.outputs;
  set_geometry(conv, c);
  conv.weight = integers(random, size_t(c.outputs) * c.kernel_h * c.kernel_w * (c.in.channels / c.groups), 3);
  switch (random() % 4) {  // nothing, bias, and BatchNorm before and after ReLU; negative scales too
    case 1: conv.pointwise.shift = integers(random, c.outputs, 5); break;
    case 2:
      conv.pointwise.scale = integers(random, c.outputs, 2);
      conv.pointwise.shift = integers(random, c.outputs, 5);
      conv.pointwise.relu = true;
      break;
    case 3:
      conv.pointwise.shift = integers(random, c.outputs, 5);
      conv.pointwise.relu = true;
      conv.pointwise.after_scale = integers(random, c.outputs, 2);
      conv.pointwise.after_shift = integers(random, c.outputs, 5);
      break;
  }
  return conv;
}

Tensor outputs_of(const Plan& plan, int output, const Tensor& images, int chunk_blocks = 0,
                  size_t keep_bytes = 64 << 20) {
  Tensor out(plan.shape(output), images.count);
  Run run = run_of(images, 0, {0}, {1, chunk_blocks, keep_bytes});
  run.outputs = out.data.data();
  plan.run(run);
  return out;
}

void check_equal(const char* kernels, Type type, const char* what, const Tensor& got, const Tensor& expected) {
  const Shape a = got.shape, b = expected.shape;
  CHECK(a.channels == b.channels && a.height == b.height && a.width == b.width, "%s, %s", kernels, what);
  size_t wrong = 0;
  for (size_t i = 0; i < got.data.size(); ++i) wrong += !(got.data[i] == expected.data[i]);
  CHECK(wrong == 0, "%s %s: %zu of %zu numbers wrong, %s", kernels, type == Type::float32 ? "float32" : "bfloat16",
        wrong, got.data.size(), what);
}

// ---- convolution ----------------------------------------------------------------------------------------------------

void check_conv(const Kernels& kernels, Type type, const Case& c, std::mt19937& random) {
  Conv conv = conv_of(c, random);
  Tensor x(c.in, c.count);
  x.data = integers(random, x.data.size(), 4);
  const Tensor expected = specification::conv<double>(x, conv);
  for (const bool noisy : {false, true}) {
    if (noisy) conv.noise = lognormal_noise(3, 0, 0);  // exp(0 * normal + 0) = 1: the way of noisy weights, exactly
    Plan plan(type, kernels, c.in);
    const int y = plan.conv(plan.input(), conv);
    plan.finish(y);
    const std::string text = describe(c) + (noisy ? ", noisy" : "");
    check_equal(kernels.name, type, text.c_str(), outputs_of(plan, y, x), expected);
    check_equal(kernels.name, type, text.c_str(), outputs_of(plan, y, x, 3, 0), expected);
  }
}

void test_conv(const Kernels& kernels, Type type) {
  std::mt19937 random(7);
  const Case cases[] = {
      // count, in, outputs, kernel, stride, padding, dilation, groups, pool
      {1, {1, 1, 1}, 1, 1, 1, 1, 0, 1, 1, false},       {17, {3, 7, 5}, 5, 3, 3, 1, 1, 1, 1, false},
      {1, {1, 9, 9}, 3, 5, 5, 1, 0, 1, 1, false},       {33, {5, 6, 6}, 7, 5, 5, 1, 2, 1, 1, false},
      {16, {7, 9, 8}, 1, 3, 3, 2, 1, 1, 1, false},      {17, {2, 11, 11}, 10, 3, 3, 1, 2, 2, 1, false},
      {5, {4, 10, 9}, 9, 3, 3, 2, 2, 2, 1, false},      {64, {6, 6, 6}, 16, 5, 5, 1, 0, 1, 1, true},
      {49, {3, 8, 8}, 6, 5, 5, 1, 0, 1, 1, true},       {80, {8, 6, 6}, 8, 3, 3, 1, 1, 1, 1, true},
      {17, {5, 7, 9}, 14, 3, 3, 1, 1, 1, 1, true},      {20, {34, 3, 3}, 34, 3, 3, 1, 1, 1, 1, false},
      {65, {64, 4, 4}, 40, 3, 3, 1, 1, 1, 1, true},     {17, {400, 1, 1}, 120, 1, 1, 1, 0, 1, 1, false},
      {17, {1301, 1, 1}, 11, 1, 1, 1, 0, 1, 1, false},  {3, {130, 3, 3}, 33, 3, 3, 1, 1, 1, 1, false},
      {17, {6, 6, 6}, 6, 3, 3, 1, 1, 1, 2, false},      {17, {6, 6, 6}, 12, 3, 3, 1, 1, 1, 3, true},
      {18, {7, 5, 5}, 7, 3, 3, 1, 1, 1, 7, false},      {19, {15, 5, 5}, 9, 3, 3, 2, 1, 1, 3, false},
      {40, {10, 6, 8}, 70, 3, 3, 1, 1, 1, 10, false},   {17, {4, 8, 8}, 6, 1, 3, 1, 0, 1, 1, false},
      {17, {4, 8, 8}, 6, 3, 1, 1, 0, 1, 1, true},       {2, {3, 4, 4}, 4, 2, 2, 3, 2, 1, 1, false},
      {2, {2, 2, 2}, 4, 3, 3, 1, 3, 1, 1, false},       {48, {9, 6, 6}, 64, 3, 3, 2, 0, 1, 1, true},
      {4, {64, 5, 5}, 130, 3, 3, 1, 1, 1, 1, false},
  };
  for (const Case& c : cases) check_conv(kernels, type, c, random);
  for (int i = 0; i < 60; ++i) {
    const int groups = 1 + (random() % 4 == 0) * (random() % 3);
    Case c{int(1 + random() % 70), {int(groups * (1 + random() % 9)), int(1 + random() % 9), int(1 + random() % 9)},
           int(groups * (1 + random() % 12)), int(1 + random() % 4), int(1 + random() % 4), int(1 + random() % 3),
           int(random() % 3), int(1 + random() % 2), groups, false};
    const int h = c.in.height + 2 * c.padding - c.dilation * (c.kernel_h - 1) - 1;
    const int w = c.in.width + 2 * c.padding - c.dilation * (c.kernel_w - 1) - 1;
    if (h < 0 || w < 0) continue;
    c.pool = random() % 2 && h / c.stride >= 1 && w / c.stride >= 1;
    check_conv(kernels, type, c, random);
  }
}

// The error of float32 is at most twice that of a plain float32 loop; both are measured against float64. The kernels
// sum in the same order and round less often, so twice leaves room for chance only.
void test_float_error(const Kernels& kernels) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  Conv conv;
  conv.outputs = 12;
  conv.kernel_h = conv.kernel_w = 3;
  conv.padding_h = conv.padding_w = 1;
  conv.weight.resize(size_t(12) * 9 * 128);
  Tensor x({128, 6, 6}, 16);
  for (float& f : conv.weight) f = normal(random);
  for (float& f : x.data) f = std::max(0.0f, normal(random));
  const Tensor exact = specification::conv<double>(x, conv), plain = specification::conv<float>(x, conv);
  Plan plan(Type::float32, kernels, x.shape);
  const int y = plan.conv(plan.input(), conv);
  plan.finish(y);
  const Tensor got = outputs_of(plan, y, x);
  double ours = 0, theirs = 0;
  for (size_t i = 0; i < got.data.size(); ++i) {
    ours += std::pow(double(got.data[i]) - exact.data[i], 2);
    theirs += std::pow(double(plain.data[i]) - exact.data[i], 2);
  }
  CHECK(std::sqrt(ours) <= 2 * std::sqrt(theirs), "%s: error %g, a plain loop's %g", kernels.name, std::sqrt(ours),
        std::sqrt(theirs));
}

// ---- the small operations -------------------------------------------------------------------------------------------

void test_small_operations(const Kernels& kernels, Type type) {
  std::mt19937 random(11);
  for (const int channels : {1, 2, 3, 5, 8}) {
    Tensor x({channels, 7, 6}, 21);
    x.data = integers(random, x.data.size(), 8);
    const auto check = [&](const char* what, const Tensor& expected, const auto& build) {
      Plan plan(type, kernels, x.shape);
      const int y = build(plan);
      plan.finish(y);
      check_equal(kernels.name, type, what, outputs_of(plan, y, x, 1), expected);
    };
    for (const Window w : {Window{2, 2, 2, 2}, Window{3, 2, 2, 1, 1, 1}})
      check("max_pool", specification::max_pool(x, w), [&](Plan& p) { return p.max_pool(p.input(), w); });
    // Windows of four, two and one: quarters and halves of small integers are exact.
    const auto begin = [](int i, int, int) { return 2 * i - 1; };
    const auto end = [](int i, int, int) { return 2 * i + 1; };
    check("average_pool", specification::average_pool(x, 4, 4, begin, end),
          [](Plan& p) { return p.average_pool(p.input(), {2, 2, 2, 2, 1, 1}); });
    check("adaptive_average_pool", specification::adaptive_average_pool(x, 6, 6),
          [](Plan& p) { return p.adaptive_average_pool(p.input(), 6, 6); });

    const Pointwise f{std::vector<float>(channels, 2), std::vector<float>(channels, -3), true,
                      std::vector<float>(channels, -1), std::vector<float>(channels, 4)};
    Tensor sum = x;
    for (float& a : sum.data) a += 4 - std::max(0.0f, 2 * a - 3);
    check("pointwise, add", sum, [&](Plan& p) { return p.add(p.pointwise(p.input(), f), p.input(), {}); });

    Conv one;  // to one channel, so that what follows it begins at an odd one if `channels` is even
    one.outputs = 1;
    one.weight.assign(channels, 1);
    const Tensor single = specification::conv<double>(x, one), joined = specification::concat({&x, &single, &x});
    const auto concat = [&](Plan& p) { return p.concat({p.input(), p.conv(p.input(), one), p.input()}); };
    check("concat", joined, concat);
    Tensor flat({joined.shape.channels * 42, 1, 1}, x.count);
    flat.data = joined.data;
    check("flatten", flat, [&](Plan& p) { return p.flatten(concat(p)); });
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : available()) {
    for (const Type type : {Type::float32, Type::bfloat16}) {
      test_conv(*kernels, type);
      test_small_operations(*kernels, type);
    }
    test_float_error(*kernels);
    printf("%s: done\n", kernels->name);
  }
  return report();
}
