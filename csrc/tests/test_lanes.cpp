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
  if (random() % 3 == 0) conv.pointwise.adc = {0.5f, float(1 + random() % 9)};  // many sums lie between two steps
  if (random() % 3 == 0) conv.pointwise.dac = {0.25f, float(1 + random() % 9)};
  switch (random() % 6) {  // nothing, bias, BatchNorm before and after ReLU, other activations; negative scales too
    case 1: conv.pointwise.shift = integers(random, c.outputs, 5); break;
    case 2:
      conv.pointwise.scale = integers(random, c.outputs, 2);
      conv.pointwise.shift = integers(random, c.outputs, 5);
      conv.pointwise.activation = Activation::relu;
      break;
    case 3:
      conv.pointwise.shift = integers(random, c.outputs, 5);
      conv.pointwise.activation = Activation::relu;
      conv.pointwise.after_scale = integers(random, c.outputs, 2);
      conv.pointwise.after_shift = integers(random, c.outputs, 5);
      break;
    case 4:
      conv.pointwise.activation = Activation::clamp;
      conv.pointwise.low = float(random() % 3) - 1;
      conv.pointwise.high = float(random() % 7) - 1;
      conv.pointwise.after_shift = integers(random, c.outputs, 5);
      break;
    case 5:
      conv.pointwise.scale = integers(random, c.outputs, 2);
      conv.pointwise.activation = Activation::leaky;
      conv.pointwise.low = float(random() % 4) - 1;
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
      {4, {64, 5, 5}, 130, 3, 3, 1, 1, 1, 1, false},    {33, {9, 11, 13}, 9, 3, 3, 1, 1, 1, 9, false},
      {17, {8, 9, 14}, 8, 5, 5, 2, 2, 1, 8, false},     {65, {5, 7, 9}, 5, 3, 3, 1, 2, 2, 5, false},
      {20, {6, 8, 8}, 6, 3, 3, 1, 1, 1, 6, true},       {16, {4, 5, 9}, 8, 3, 3, 1, 1, 1, 4, false},
      {18, {130, 3, 5}, 130, 3, 3, 1, 1, 1, 130, false}, {17, {3, 2, 2}, 3, 5, 5, 1, 2, 1, 3, false},
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

// ---- activations -----------------------------------------------------------------------------------------------------

constexpr Activation kCurves[] = {Activation::sigmoid,   Activation::tanh,        Activation::silu,     Activation::gelu,
                                  Activation::gelu_tanh, Activation::hardsigmoid, Activation::hardswish};

// The error that activations.h allows, and in bfloat16 what rounding to 8 bits loses.
double allowed(Type type, double x, double y) {
  const double exact = 5e-7 * std::abs(y) + 2e-9 * std::min(std::abs(x), 1.0) + 1e-37;
  return type == Type::float32 ? exact : exact + std::abs(y) / 256;
}

// Every exponent and sign, NaN and the infinities, of which torch makes what is listed here. As an operation of its own
// and as the end of a convolution, with an odd number of channels whose partner has to stay zero.
void test_activations(const Kernels& kernels, Type type) {
  std::mt19937 random(17);
  const Shape shape{3, 8, 11};
  Tensor x(shape, 20);
  for (float& f : x.data) {
    const int exponent = int(random() % 44) - 36;
    f = std::ldexp(1 + float(random() % 1024) / 1024, exponent) * (random() % 2 ? 1.0f : -1.0f);
    if (random() % 2) f = float(int(random() % 4001) - 2000) / 128;
    if (type == Type::bfloat16) f = bfloat16(f);
  }
  const float inf = INFINITY, special[] = {NAN, inf, -inf, 0.0f};
  for (int i = 0; i < 4; ++i) x.at(i, i % 3, 1, i) = special[i];
  for (const Activation activation : kCurves) {
    const float at_inf = activation == Activation::sigmoid || activation == Activation::tanh ||
                                 activation == Activation::hardsigmoid
                             ? 1
                             : inf;
    const float at_minus_inf = activation == Activation::tanh ? -1 : at_inf == 1 ? 0 : NAN;
    Pointwise f;
    f.activation = activation;
    Conv conv;  // the identity, so that the activation ends a convolution; then a sum over all channels
    conv.outputs = 3;
    conv.weight = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    conv.pointwise = f;
    Conv depthwise;
    depthwise.outputs = depthwise.groups = 3;
    depthwise.weight.assign(3, 1);
    depthwise.pointwise = f;
    for (const int fused : {0, 1, 2}) {
      Plan plan(type, kernels, shape);
      const int y = fused ? plan.conv(plan.input(), fused == 1 ? conv : depthwise) : plan.pointwise(plan.input(), f);
      plan.finish(y);
      const Tensor got = outputs_of(plan, y, x, 1);
      double worst = 0;
      for (int n = 0; n < x.count; ++n)
        for (int c = 0; c < 3; ++c)
          for (int h = 0; h < shape.height; ++h)
            for (int w = 0; w < shape.width; ++w) {
              const float a = x.at(n, c, h, w), b = got.at(n, c, h, w);
              if (!std::isfinite(a)) {
                const float wanted = std::isnan(a) ? NAN : a > 0 ? at_inf : at_minus_inf;
                CHECK(fused == 1 || (std::isnan(wanted) ? std::isnan(b) : b == wanted), "%s %s, %s of %g: %g", kernels.name,
                      name(type), name(activation), a, b);
                continue;
              }
              // A fused identity adds zero times an infinity of another channel of the pixel.
              if (fused == 1 && h == 1 && w < 4 && n == w) continue;
              const double wanted = specification::activation(f, a);
              worst = std::max(worst, std::abs(b - wanted) / allowed(type, a, wanted));
            }
      CHECK(worst <= 1, "%s %s, %s: %g times the error allowed", kernels.name, name(type), name(activation), worst);
    }
    // All channels summed, the zero partner of the last one included.
    Conv sum;
    sum.outputs = 1;
    sum.weight.assign(3, 1);
    Plan plan(type, kernels, shape);
    const int y = plan.conv(plan.pointwise(plan.input(), f), sum);
    plan.finish(y);
    const float got = outputs_of(plan, y, x).at(19, 0, 7, 10);
    double wanted = 0, error = 0;
    for (int c = 0; c < 3; ++c) {
      const double a = x.at(19, c, 7, 10), b = specification::activation(f, a);
      wanted += type == Type::float32 ? b : bfloat16(float(b));
      error += allowed(type, a, b) + 1e-6 * std::abs(b);
    }
    CHECK(std::abs(got - wanted) <= error, "%s %s, %s: the sum of the channels is %g instead of %g", kernels.name,
          name(type), name(activation), got, wanted);
  }
}

// Mean and variance over the channels of a pixel (groups = 0), or over a group's channels and pixels. float32: the sums
// are in float32. bfloat16: the result is rounded to 8 bits.
void check_norm(const Kernels& kernels, Type type, int channels, int groups) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(2, 3);
  Tensor x({channels, 3, 5}, 37);
  for (float& f : x.data) f = type == Type::float32 ? normal(random) : bfloat16(normal(random));
  x.at(2, 0, 1, 1) = NAN;
  Pointwise f;
  for (int c = 0; c < channels; ++c) f.scale.push_back(normal(random)), f.shift.push_back(normal(random));
  f.activation = Activation::relu;
  Plan plan(type, kernels, x.shape);
  const int y = groups ? plan.group_norm(plan.input(), groups, 0.5f, f) : plan.layer_norm(plan.input(), 0.5f, f);
  plan.finish(y);
  const Tensor got = outputs_of(plan, y, x, 1);
  const int members = groups ? channels / groups : channels;
  double worst = 0;
  int lost = 0;
  for (int n = 0; n < x.count; ++n)
    for (int i = 0; i < 15; ++i)
      for (int c = 0; c < channels; ++c) {
        double mean = 0, variance = 0;
        int count = 0;
        const auto each = [&](const auto& work) {
          for (int d = c / members * members; d < (c / members + 1) * members; ++d)
            for (int j = 0; j < 15; ++j)
              if (groups || i == j) work(double(x.at(n, d, j / 5, j % 5)));
        };
        each([&](double a) { mean += a, ++count; });
        mean /= count;
        each([&](double a) { variance += std::pow(a - mean, 2) / count; });
        const double normalized = (x.at(n, c, i / 5, i % 5) - mean) / std::sqrt(variance + 0.5);
        const double found = got.at(n, c, i / 5, i % 5);
        if (std::isnan(normalized) || std::isnan(found)) {
          lost += !std::isnan(normalized) || !std::isnan(found);
          continue;
        }
        const double wanted = std::max(0.0, normalized * f.scale[c] + f.shift[c]);
        // What is subtracted is rounded too.
        const double size = (std::abs(x.at(n, c, i / 5, i % 5)) + std::abs(mean)) / std::sqrt(variance + 0.5);
        worst = std::max(worst, std::abs(found - wanted) / (size * std::abs(f.scale[c]) + std::abs(f.shift[c])));
      }
  CHECK(lost == 0 && worst <= (type == Type::float32 ? 2e-6 : 1.0 / 256), "%s %s: %d channels, %d groups: error %g, %d NaN",
        kernels.name, name(type), channels, groups, worst, lost);
}

void test_norms(const Kernels& kernels, Type type) {
  for (const int channels : {1, 2, 7, 96}) check_norm(kernels, type, channels, 0);
  for (const auto& [channels, groups] : {std::pair{1, 1}, {6, 2}, {9, 3}, {7, 7}, {32, 4}})
    check_norm(kernels, type, channels, groups);
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
    for (const Window w : {Window{2, 2, 2, 2}, Window{3, 2, 2, 1, 1, 1}, Window{2, 3, 2, 3, 0, 1, true}, Window{2, 2, 4, 3, 1, 1, true}})
      check("max_pool", specification::max_pool(x, w), [&](Plan& p) { return p.max_pool(p.input(), w); });
    // Windows of four, two and one: quarters and halves of small integers are exact.
    const auto begin = [](int i, int, int) { return 2 * i - 1; };
    const auto end = [](int i, int, int) { return 2 * i + 1; };
    check("average_pool", specification::average_pool(x, 4, 4, begin, end),
          [](Plan& p) { return p.average_pool(p.input(), {2, 2, 2, 2, 1, 1}); });
    check("adaptive_average_pool", specification::adaptive_average_pool(x, 6, 6),
          [](Plan& p) { return p.adaptive_average_pool(p.input(), 6, 6); });

    const Pointwise f{std::vector<float>(channels, 2), std::vector<float>(channels, -3), Activation::relu,
                      std::vector<float>(channels, -1), std::vector<float>(channels, 4)};
    Tensor sum = x;
    for (float& a : sum.data) a += 4 - std::max(0.0f, 2 * a - 3);
    check("pointwise, add", sum, [&](Plan& p) { return p.add(p.pointwise(p.input(), f), p.input(), {}); });

    Pointwise converters;
    converters.adc = {0.5f, 3};
    converters.scale.assign(channels, -3);
    converters.dac = {0.25f, 2};
    Tensor steps = x;
    for (size_t i = 0; i < x.data.size(); ++i) steps.data[i] = specification::apply<float>(converters, 0, 0 + x.data[i]);
    check("converters", steps, [&](Plan& p) { return p.pointwise(p.input(), converters); });

    Pointwise bounded;  // to one bit more than a power of two, so that products of two are exact in bfloat16
    bounded.activation = Activation::clamp;
    bounded.low = 1, bounded.high = 3;
    Tensor product = x, scaled = x;
    for (float& a : product.data) a *= std::min(std::max(a, 1.0f), 3.0f);
    check("multiply", product, [&](Plan& p) { return p.multiply(p.input(), p.pointwise(p.input(), bounded), {}); });
    const Tensor largest = specification::max_pool(x, {7, 6, 1, 1});
    for (int n = 0; n < x.count; ++n)
      for (int c = 0; c < channels; ++c)
        for (int i = 0; i < 42; ++i) scaled.at(n, c, i / 6, i % 6) = x.at(n, c, i / 6, i % 6) * largest.at(n, c, 0, 0);
    check("multiply, one number a map", scaled,
          [&](Plan& p) { return p.multiply(p.input(), p.max_pool(p.input(), {7, 6, 1, 1}), {}); });

    std::vector<int> order;  // every second channel, from the last one on, and one of them twice
    for (int c = channels - 1; c >= 0; c -= 2) order.push_back(c);
    order.push_back(channels - 1);
    Tensor picked({int(order.size()), 7, 6}, x.count);
    for (int n = 0; n < x.count; ++n)
      for (size_t c = 0; c < order.size(); ++c)
        for (int i = 0; i < 42; ++i) picked.at(n, int(c), i / 6, i % 6) = x.at(n, order[c], i / 6, i % 6);
    check("channels", picked, [&](Plan& p) { return p.channels(p.input(), order); });

    const std::vector<int> rows = {1, 0, 6, -1, 6}, cols = {-1, 5, 2, 2, 0, -1, 4};
    Tensor moved({channels, 5, 7}, x.count);
    for (int n = 0; n < x.count; ++n)
      for (int c = 0; c < channels; ++c)
        for (int i = 0; i < 5; ++i)
          for (int j = 0; j < 7; ++j)
            moved.at(n, c, i, j) = rows[i] < 0 || cols[j] < 0 ? 0 : x.at(n, c, rows[i], cols[j]);
    check("pixels", moved, [&](Plan& p) { return p.pixels(p.input(), rows, cols); });

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
      test_activations(*kernels, type);
      test_norms(*kernels, type);
    }
    test_float_error(*kernels);
    printf("%s: done\n", kernels->name);
  }
  return report();
}
