// Whole networks: noise is that of the specification whatever the tiles and chunks, networks agree with the
// specification of their operations, and neither threads nor chunks nor memory limits change a bit.
//
//   cmake --preset release -S csrc && cmake --build build/release && build/release/tests/test_engine
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>

#include "networks.h"
#include "specification.h"
#include "testing.h"

using namespace correctnet;
using specification::Tensor;

namespace {

// ---- noise ----------------------------------------------------------------------------------------------------------

// An image that is 1 in one place and 0 elsewhere gives back the weights that meet this place, bit for bit.
void check_identity(const Kernels& kernels, Type type, Shape in, int outputs, int groups,
                    const Noise& noise = lognormal_noise(7, 0.5, -0.125)) {
  RandomLayers random(0.5);
  Conv conv = random.conv(in.channels / groups, outputs, 1);
  conv.kernel_h = in.height;
  conv.kernel_w = in.width;
  conv.groups = groups;
  conv.weight = random.normal(size_t(outputs) * in.height * in.width * in.channels / groups, 1);
  conv.pointwise = {};
  set_noise(conv, noise);
  const int places = in.channels * in.height * in.width;
  Tensor x(in, places);
  for (int i = 0; i < places; ++i) x.data[size_t(i) * places + i] = 1;
  Plan plan(type, kernels, in);
  plan.finish(plan.conv(plan.input(), conv));

  const uint64_t seed = 0xfedcba9876543210;
  const std::vector<uint32_t> samples = {0, 4000000000u, 12};
  for (const How how : {How{1, 1}, How{1, 4, 0}, How{2, 2, 100000}}) {
    const std::vector<float> got = outputs_of(plan, {outputs, 1, 1}, x, seed, samples, how);
    size_t wrong = 0;
    for (size_t s = 0; s < samples.size(); ++s) {
      const std::vector<float> noisy = noisy_weights(conv, seed, samples[s]);
      const int channels = in.channels / groups;
      for (int i = 0; i < places; ++i)
        for (int o = 0; o < outputs; ++o) {
          const int c = i / (in.height * in.width), tap = i % (in.height * in.width);
          const int k = c - o / (outputs / groups) * channels;
          float expected = 0;
          if (k >= 0 && k < channels) expected = noisy[(size_t(o) * in.height * in.width + tap) * channels + k];
          if (type == Type::bfloat16) expected = bfloat16(expected);
          wrong += got[(s * places + i) * outputs + o] != expected;
        }
    }
    CHECK(wrong == 0, "%s %s: %zu wrong weights, %d x %d x %d, %d outputs", kernels.name, name(type), wrong,
          in.channels, in.height, in.width, outputs);
  }
}

// ---- networks -------------------------------------------------------------------------------------------------------

// The operations of a Plan by the specification, on the chip `sample`. Values are rounded where a bfloat16 plan stores
// them.
class Reference {
 public:
  Reference(Type type, const Tensor& images, uint64_t seed, uint32_t sample) : type_(type), seed_(seed), sample_(sample) {
    add(images);
  }
  int input() const { return 0; }
  Shape shape(int value) const { return values_[value].shape; }
  int conv(int x, Conv conv) {
    if (conv.noise) conv.weight = noisy_weights(conv, seed_, sample_);
    round(conv.weight);
    return add(specification::conv<double>(values_[x], conv));
  }
  int linear(int x, const Linear& linear) {
    const Shape s = values_[x].shape;
    Tensor flat({s.channels * s.height * s.width, 1, 1}, values_[x].count);
    flat.data = values_[x].data;
    values_.push_back(flat);
    Conv c;
    c.outputs = linear.outputs;
    c.weight = linear.weight;
    c.noise = linear.noise;
    c.spread = linear.spread;
    c.reach = linear.reach;
    c.pointwise = linear.pointwise;
    return conv(int(values_.size()) - 1, c);
  }
  int concat(const std::vector<int>& parts) {
    std::vector<const Tensor*> tensors;
    for (const int part : parts) tensors.push_back(&values_[part]);
    return add(specification::concat(tensors));
  }
  int adaptive_average_pool(int x, int height, int width) {
    return add(specification::adaptive_average_pool(values_[x], height, width));
  }
  const Tensor& last() const { return last_; }  // not rounded

 private:
  void round(std::vector<float>& v) const {
    if (type_ == Type::bfloat16)
      for (float& f : v) f = bfloat16(f);
  }
  int add(Tensor value) {
    last_ = value;
    round(value.data);
    values_.push_back(std::move(value));
    return int(values_.size()) - 1;
  }

  Type type_;
  uint64_t seed_;
  uint32_t sample_;
  std::vector<Tensor> values_;
  Tensor last_{{1, 1, 1}, 1};
};

// float32: some hundred roundings of 2^-24 a sum, through up to 21 layers. bfloat16: both sides round activations to 8
// bits in the same places, but sums that differ in their last bit may round to neighbours, 2^-8 apart.
template <class Build>
void check_network(const Kernels& kernels, Type type, const char* what, const Tensor& images, const Build& build) {
  const std::vector<uint32_t> samples = {3, 900};
  Plan plan(type, kernels, images.shape);
  const int y = build(plan);
  plan.finish(y);
  const std::vector<float> got = outputs_of(plan, plan.shape(y), images, 42, samples);
  double error = 0, size = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    Reference reference(type, images, 42, samples[s]);
    build(reference);
    const std::vector<float>& expected = reference.last().data;
    for (size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(got[s * expected.size() + i] - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
  }
  const double relative = std::sqrt(error / size), limit = type == Type::float32 ? 1e-5 : 1e-2;
  CHECK(relative <= limit && size > 0, "%s %s, %s: relative error %g", kernels.name, name(type), what, relative);
}

void test_networks(const Kernels& kernels, Type type) {
  check_network(kernels, type, "LeNet-5", random_images({1, 32, 32}, 5), [](auto& net) { return lenet5(net, 0.5); });
  check_network(kernels, type, "LeNet-5, 3 channels", random_images({3, 32, 32}, 2),
                [](auto& net) { return lenet5(net, 0.2); });
  const Tensor images = random_images({3, 32, 32}, 3);
  for (const BatchNorm b : {BatchNorm::none, BatchNorm::before, BatchNorm::after})
    check_network(kernels, type, "VGG16 / 16", images, [b](auto& net) { return vgg16(net, 0.3, b, 16); });
  check_network(kernels, type, "VGG16 / 16, compensated", images,
                [](auto& net) { return vgg16(net, 0.3, BatchNorm::before, 16, 6, 5); });
}

// ---- invariances ----------------------------------------------------------------------------------------------------

void test_invariance(const Kernels& kernels, Type type) {
  const Tensor images = random_images({1, 14, 14}, 150);
  RandomLayers random(0.5);
  Conv c1 = random.conv(1, 6, 5), c2 = random.conv(6, 16, 3);
  c1.pool = true;
  Plan plan(type, kernels, images.shape);
  const int hidden = plan.linear(plan.conv(plan.conv(plan.input(), c1), c2), random.linear(144, 20));
  plan.finish(plan.linear(hidden, random.linear(20, 10, true)));
  const Shape out{10, 1, 1};
  const std::vector<uint32_t> samples = {0, 1, 2, 77, 3};
  const std::vector<float> expected = outputs_of(plan, out, images, 5, samples);
  for (const How how : {How{3, 1}, How{2, 2, 0}, How{8, 4, 6000}, How{1, 7, 0}, How{16, 1}})
    CHECK(outputs_of(plan, out, images, 5, samples, how) == expected, "%s %s: %d threads, %d blocks, %zu bytes",
          kernels.name, name(type), how.threads, how.chunk_blocks, how.keep_bytes);

  // one chip alone, on the last images alone
  Tensor few(images.shape, 21);
  few.data.assign(images.data.end() - few.data.size(), images.data.end());
  const std::vector<float> replayed = outputs_of(plan, out, few, 5, {77});
  CHECK(std::equal(replayed.begin(), replayed.end(), expected.begin() + (3 * 150 + 129) * 10), "%s %s: replay",
        kernels.name, name(type));
  CHECK(outputs_of(plan, out, few, 6, {77}) != replayed, "%s %s: another seed", kernels.name, name(type));

  // correct predictions, with ties counted for the first
  std::vector<int64_t> labels(images.count), correct(samples.size()), counted(samples.size());
  for (int n = 0; n < images.count; ++n) labels[n] = n % 10;
  Run run = run_of(images, 5, samples, {2});
  run.labels = labels.data();
  run.correct = correct.data();
  plan.run(run);
  for (size_t s = 0; s < samples.size(); ++s)
    for (int n = 0; n < images.count; ++n) {
      const auto logits = expected.begin() + (s * images.count + n) * 10;
      counted[s] += std::max_element(logits, logits + 10) - logits == labels[n];
    }
  CHECK(correct == counted, "%s %s: correct predictions", kernels.name, name(type));
}

// NaN and infinity propagate to the outputs of their image, where they are counted, and to no other image, neither in
// the same vector nor in the next chunk, which uses the same buffers. With all kinds of pools, and for AMX, which
// multiplies what lies past a tensor by zeros.
void test_nonfinite(const Kernels& kernels, Type type) {
  Tensor images = random_images({3, 17, 17}, 50), clean = images;
  const float inf = INFINITY;
  const std::vector<std::pair<int, float>> bad = {{3, NAN}, {20, inf}, {33, -inf}, {34, NAN}};
  for (const auto& [image, value] : bad)
    for (int c = 0; c < 3; ++c) images.at(image, c, 8, 7 + c % 2) = value;
  for (const bool pool : {true, false}) {
    RandomLayers random(0.5);
    Conv c1 = random.conv(3, 9, 3, 1), c2 = random.conv(9, 33, 3), c3 = random.conv(33, 5, 3, 1);
    c1.pool = c3.pool = pool;
    c3.pointwise.scale.assign(5, -1);
    Plan plan(type, kernels, images.shape);
    int x = plan.max_pool(plan.conv(plan.conv(plan.input(), c1), c2), {3, 3, 2, 2, 1, 1});
    x = plan.adaptive_average_pool(plan.conv(x, c3), 1, 1);
    plan.finish(plan.linear(x, random.linear(5, 10, true)));
    const std::vector<uint32_t> samples = {1, 5, 6};
    for (const How how : {How{1, 1}, How{2, 3, 0}}) {
      const std::vector<float> got = outputs_of(plan, {10, 1, 1}, images, 5, samples, how);
      const std::vector<float> wanted = outputs_of(plan, {10, 1, 1}, clean, 5, samples, how);
      std::vector<int64_t> labels(images.count), correct(samples.size()), nonfinite(samples.size());
      for (int n = 0; n < images.count; ++n)
        labels[n] = std::max_element(&wanted[n * 10], &wanted[n * 10] + 10) - &wanted[n * 10];
      Run run = run_of(images, 5, samples, how);
      run.labels = labels.data();
      run.correct = correct.data();
      run.nonfinite = nonfinite.data();
      plan.run(run);
      for (size_t s = 0; s < samples.size(); ++s) {
        int64_t right = 0, odd = 0;
        for (int n = 0; n < images.count; ++n) {
          const float* logits = &got[(s * images.count + n) * 10];
          const auto spoiled = std::find_if(bad.begin(), bad.end(), [n](const auto& b) { return b.first == n; });
          const bool nan = std::any_of(logits, logits + 10, [](float f) { return std::isnan(f); });
          if (spoiled == bad.end())
            CHECK(std::equal(logits, logits + 10, &wanted[(s * images.count + n) * 10]), "%s %s: image %d has changed",
                  kernels.name, name(type), n);
          else if (std::isnan(spoiled->second))
            CHECK(std::all_of(logits, logits + 10, [](float f) { return std::isnan(f); }), "%s %s: image %d lost its NaN",
                  kernels.name, name(type), n);
          right += !nan && std::max_element(logits, logits + 10) - logits == labels[n];
          odd += std::any_of(logits, logits + 10, [](float f) { return !std::isfinite(f); });
        }
        CHECK(correct[s] == right && nonfinite[s] == odd && odd >= 2, "%s %s: %d and %d instead of %d and %d", kernels.name,
              name(type), int(correct[s]), int(nonfinite[s]), int(right), int(odd));
      }
    }
  }
}

// AVX2 and both kinds of AVX-512 add in the same order and fuse what they multiply, so their float32 is the same.
void test_agreement() {
  const Tensor images = random_images({3, 32, 32}, 40);
  std::vector<float> first;
  for (const Isa isa : supported_isas()) {
    if (isa == Isa::portable) continue;
    Plan plan(Type::float32, kernels(isa), images.shape);
    plan.finish(vgg16(plan, 0.3, BatchNorm::after, 8, 2, 3));
    const std::vector<float> got = outputs_of(plan, {10, 1, 1}, images, 42, {1});
    if (first.empty()) first = got;
    CHECK(got == first, "%s", name(isa));
  }
}

// Layers before the first sampled one run once for all chips, with the same result; so does a plan without any noise.
void test_clean_prefix(const Kernels& kernels, Type type) {
  const Tensor images = random_images({3, 12, 12}, 40);
  RandomLayers random(0.5);
  Conv c1 = random.conv(3, 9, 3, 1), c2 = random.conv(9, 8, 3, 1), c3 = random.conv(17, 5, 3);
  c1.pool = true;
  const auto outputs = [&](std::vector<bool> noisy) {
    Plan plan(type, kernels, images.shape);
    Conv layers[] = {c1, c2, c3};
    for (int i = 0; i < 3; ++i)
      if (!noisy[i]) layers[i].noise.reset();
    const int x = plan.conv(plan.input(), layers[0]);
    const int y = plan.conv(plan.concat({x, plan.conv(x, layers[1])}), layers[2]);
    plan.finish(y);
    return outputs_of(plan, plan.shape(y), images, 1, {8, 9}, {2, 1});
  };
  c1.noise->scale = c1.noise->offset = 0;  // sampled, but exactly the nominal weights
  CHECK(outputs({true, true, true}) == outputs({false, true, true}), "%s %s", kernels.name, name(type));
  c2.noise->scale = c2.noise->offset = 0;
  CHECK(outputs({true, true, true}) == outputs({false, false, true}), "%s %s", kernels.name, name(type));
  c3.noise->scale = c3.noise->offset = 0;
  CHECK(outputs({true, true, true}) == outputs({false, false, false}), "%s %s", kernels.name, name(type));
}

// (count, channels, area) as (count, area, channels).
std::vector<float> channels_last(const std::vector<float>& a, size_t count, size_t channels, size_t area) {
  std::vector<float> b(a.size());
  for (size_t n = 0; n < count; ++n)
    for (size_t c = 0; c < channels; ++c)
      for (size_t p = 0; p < area; ++p) b[(n * area + p) * channels + c] = a[(n * channels + c) * area + p];
  return b;
}

// Images and outputs with the channels last have the values of those with the channels first.
void test_channels_last(const Kernels& kernels, Type type) {
  for (const auto& [in, outputs, count] : {std::tuple(Shape{3, 4, 5}, 7, 17), std::tuple(Shape{261, 1, 3}, 263, 33),
                                           std::tuple(Shape{1, 2, 2}, 1, 70), std::tuple(Shape{130, 1, 1}, 258, 5)}) {
    RandomLayers random(0.5);
    const Tensor images = random_images(in, count);
    Plan plan(type, kernels, in);
    const int y = plan.conv(plan.input(), random.conv(in.channels, outputs, 1));
    plan.finish(y);
    const size_t area = size_t(in.height) * in.width;
    const std::vector<uint32_t> samples = {3, 9};
    const std::vector<float> wanted =
        channels_last(outputs_of(plan, plan.shape(y), images, 5, samples), samples.size() * count, outputs, area);
    const std::vector<float> x = channels_last(images.data, count, in.channels, area);
    std::vector<float> got(wanted.size());
    Run run = run_of(images, 5, samples, {});
    run.images = x.data();
    run.outputs = got.data();
    run.images_last = run.outputs_last = true;
    plan.run(run);
    CHECK(got == wanted, "%s %s: %d channels", kernels.name, name(type), in.channels);
  }
}

// ---- errors ---------------------------------------------------------------------------------------------------------

template <class Work>
void check_throws(const char* what, const Work& work) {
  try {
    work();
  } catch (const std::invalid_argument& e) {
    CHECK(std::string(e.what()).find(what) != std::string::npos, "\"%s\" instead of \"%s\"", e.what(), what);
    return;
  }
  CHECK(false, "no error: %s", what);
}

void test_errors() {
  const auto plan_with = [](const auto& build) {
    Plan plan(Type::float32, kernels_portable, {4, 6, 6});
    build(plan);
  };
  const auto conv = [](int outputs, size_t weights, const auto& change) {
    Conv c;
    c.outputs = outputs;
    c.kernel_h = c.kernel_w = 3;
    c.weight.resize(weights);
    change(c);
    return c;
  };
  const auto none = [](Conv&) {};
  const auto conv_fails = [&](const char* what, size_t weights, const auto& change) {
    check_throws(what, [&] { plan_with([&](Plan& p) { p.conv(0, conv(2, weights, change)); }); });
  };
  conv_fails("71 weights instead of 72", 71, none);
  conv_fails("3 groups do not divide 4 channels", 72, [](Conv& c) { c.groups = 3; });
  conv_fails("kernel is larger", 0, [](Conv& c) { c.kernel_h = 7; });
  conv_fails("at least 1", 72, [](Conv& c) { c.stride_w = 0; });
  conv_fails("1 numbers for 2 channels", 72, [](Conv& c) { c.pointwise.shift = {1}; });
  conv_fails("smaller than the pool", 72, [](Conv& c) {
    c.stride_h = 6;
    c.pool = true;
  });
  for (const double sigma : {14.0, double(NAN), -1.0})
    check_throws("outside the range", [&] { lognormal_noise(0, sigma, 0); });
  for (const Noise& noise : array_noises(7)) {
    Conv conv = RandomLayers(0.5).conv(2, 3, 3, 1);
    set_noise(conv, noise);
    const auto refuses = [&](const Conv& wrong) {
      check_throws("do not fit the noise", [&] { Plan(Type::float32, kernels_portable, {2, 5, 5}).conv(0, wrong); });
    };
    Conv wrong = conv;
    wrong.spread.pop_back();
    refuses(wrong);
    wrong = conv;
    wrong.reach.resize(noise.faults.any ? 2 : 3);
    refuses(wrong);
    wrong = conv;
    wrong.noise = lognormal_noise(0, 0.5, 0);
    refuses(wrong);
  }
  check_throws("no value 1", [&] { plan_with([&](Plan& p) { p.conv(1, conv(2, 72, none)); }); });
  check_throws("144 numbers", [&] {
    plan_with([&](Plan& p) {
      Pointwise f;
      f.scale.resize(144);
      p.linear(0, {3, std::vector<float>(432), std::nullopt, f});
    });
  });
  check_throws("differ in size", [&] { plan_with([&](Plan& p) { p.concat({0, p.max_pool(0, {2, 2, 2, 2})}); }); });
  check_throws("shapes that differ", [&] { plan_with([&](Plan& p) { p.add(0, p.concat({0, 0}), {}); }); });
  check_throws("3 groups do not divide 4 channels", [&] { plan_with([&](Plan& p) { p.group_norm(0, 3, 0, {}); }); });
  check_throws("eps is at least 0", [&] { plan_with([&](Plan& p) { p.layer_norm(0, NAN, {}); }); });
  check_throws("ceil goes with", [&] { plan_with([&](Plan& p) { p.average_pool(0, {2, 2, 2, 2, 0, 0, true}); }); });
  check_throws("multiply: two shapes", [&] { plan_with([&](Plan& p) { p.multiply(p.max_pool(0, {6, 6, 1, 1}), 0, {}); }); });
  check_throws("no row or column 6", [&] { plan_with([&](Plan& p) { p.pixels(0, {0, 6}, {0}); }); });
  check_throws("no row or column -2", [&] { plan_with([&](Plan& p) { p.pixels(0, {0}, {-2}); }); });
  check_throws("empty", [&] { plan_with([&](Plan& p) { p.pixels(0, {}, {0}); }); });
  check_throws("no channel 4 of 4", [&] { plan_with([&](Plan& p) { p.channels(0, {3, 4}); }); });
  check_throws("empty", [&] { plan_with([&](Plan& p) { p.channels(0, {}); }); });
  conv_fails("cannot be fused with the activation silu", 72, [](Conv& c) {
    c.pointwise.activation = Activation::silu;
    c.pool = true;
  });
  conv_fails("infinite slope", 72, [](Conv& c) {
    c.pointwise.activation = Activation::leaky;
    c.pointwise.low = INFINITY;
  });
  conv_fails("that is NaN", 72, [](Conv& c) {
    c.pointwise.activation = Activation::clamp;
    c.pointwise.high = NAN;
  });
  check_throws("half the kernel", [&] { plan_with([&](Plan& p) { p.max_pool(0, {2, 2, 2, 2, 2, 0}); }); });
  check_throws("empty", [&] { plan_with([&](Plan& p) { p.adaptive_average_pool(0, 0, 1); }); });
  check_throws("is finished", [&] {
    plan_with([&](Plan& p) {
      p.finish(0);
      p.flatten(0);
    });
  });
  const auto run_fails = [&](const char* what, const auto& change) {
    check_throws(what, [&] {
      plan_with([&](Plan& p) {
        p.finish(p.flatten(0));
        std::vector<float> images(144);
        std::vector<int64_t> labels(1);
        Run run;
        run.images = images.data();
        run.count = 1;
        run.samples = {0};
        change(run);
        p.run(run);
      });
    });
  };
  run_fails("at least 1", [](Run& r) { r.count = 0; });
  run_fails("at least 1", [](Run& r) { r.samples.clear(); });
  run_fails("at least 1", [](Run& r) { r.threads = 0; });
  run_fails("missing", [](Run& r) { r.images = nullptr; });
  static const int64_t label = 0;
  run_fails("one of labels and correct", [](Run& r) { r.labels = &label; });
  static int64_t odd;
  run_fails("beside correct", [](Run& r) { r.nonfinite = &odd; });
  check_throws("not finished", [&] { plan_with([](Plan& p) { p.run({}); }); });
}

}  // namespace

int main() {
  for (const Kernels* kernels : available()) {
    for (const Type type : {Type::float32, Type::bfloat16}) {
      for (const int outputs : {1, 5, 14, 33}) check_identity(*kernels, type, {3, 3, 5}, outputs, 1);
      check_identity(*kernels, type, {4, 3, 3}, 10, 1);
      check_identity(*kernels, type, {64, 2, 2}, 20, 1);
      check_identity(*kernels, type, {1, 5, 5}, 6, 1);
      check_identity(*kernels, type, {257, 1, 1}, 190, 1);
      check_identity(*kernels, type, {15, 2, 2}, 9, 3);
      for (const Noise& noise : array_noises(7)) {
        check_identity(*kernels, type, {3, 3, 5}, 14, 1, noise);
        check_identity(*kernels, type, {257, 1, 1}, 19, 1, noise);
        check_identity(*kernels, type, {15, 2, 2}, 9, 3, noise);
        check_identity(*kernels, type, {6, 3, 3}, 6, 6, noise);  // a channel and an output a group
      }
      test_networks(*kernels, type);
      test_invariance(*kernels, type);
      test_nonfinite(*kernels, type);
      test_clean_prefix(*kernels, type);
      test_channels_last(*kernels, type);
    }
    printf("%s: done\n", kernels->name);
  }
  test_agreement();
  test_errors();
  return report();
}
