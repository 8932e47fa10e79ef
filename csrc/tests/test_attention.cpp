// Attention and rearranged pixels on every instruction set that this machine has, against plain loops in float64.
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>

#include "specification.h"
#include "testing.h"

using namespace correctnet;
using specification::Tensor;

namespace {

struct Case {
  int count, height, width, length;  // images and their size; tokens of a group
  int heads, channels;               // and channels a head
  bool joined, bias, mask, causal;   // whether q, k, v are channels of one value
};

Tensor outputs_of(const Plan& plan, int output, const Tensor& images, int chunk_blocks) {
  Tensor out(plan.shape(output), images.count);
  Run run = run_of(images, 0, {0}, {1, chunk_blocks, 64 << 20});
  run.outputs = out.data.data();
  plan.run(run);
  return out;
}

std::vector<float> normal(std::mt19937& random, size_t n, float deviation) {
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> v(n);
  for (float& f : v) f = distribution(random);
  return v;
}

// (y - wanted) relative to the largest value that y is a mean of: float32 sums, or results rounded to bfloat16.
void check_attention(const Kernels& kernels, Type type, const Case& c, std::mt19937& random) {
  const int all = c.heads * c.channels, pixels = c.height * c.width, length = c.length;
  Tensor x({3 * all + 2, c.height, c.width}, c.count);
  x.data = normal(random, x.data.size(), 2);
  for (float& f : x.data) f = type == Type::bfloat16 ? bfloat16(f) : f;
  if (c.count > 3) x.at(2, 2 + 2 * all, 0, 0) = NAN;  // one value, of a token that all tokens of its group see
  Attention a;
  a.heads = c.heads, a.width = c.channels, a.length = length, a.scale = 0.3f;
  a.tokens.resize(pixels);
  std::iota(a.tokens.begin(), a.tokens.end(), 0);
  std::shuffle(a.tokens.begin(), a.tokens.end(), random);
  if (c.bias || c.causal) a.bias = normal(random, size_t(c.heads) * length * length, 2);
  if (c.mask) a.mask = normal(random, size_t(pixels) * length, 2);
  for (int h = 0; c.causal && h < c.heads; ++h)
    for (int i = 0; i < length; ++i)
      for (int j = i + 1; j < length; ++j) a.bias[(h * length + i) * length + j] = -INFINITY;

  Plan plan(type, kernels, x.shape);
  int inputs[3] = {0, 0, 0};
  for (int i = 0; i < 3; ++i) a.first[i] = 2 + i * all;
  for (int i = 0; i < 3 && !c.joined; ++i) {
    std::vector<int> order(all);
    std::iota(order.begin(), order.end(), a.first[i]);
    inputs[i] = plan.channels(0, order);
    a.first[i] = 0;
  }
  const int y = plan.attention(inputs[0], inputs[1], inputs[2], a);
  plan.finish(y);
  const Tensor got = outputs_of(plan, y, x, 1 + c.count % 3);

  const auto at = [&](int n, int part, int head, int channel, int token) {
    return double(x.at(n, 2 + part * all + head * c.channels + channel, token / c.width, token % c.width));
  };
  double worst = 0;
  int lost = 0;
  for (int n = 0; n < c.count; ++n)
    for (int i = 0; i < pixels; ++i)
      for (int h = 0; h < c.heads; ++h) {
        const int group = i / length, in_group = i % length;
        std::vector<double> p(length);
        for (int j = 0; j < length; ++j) {
          for (int d = 0; d < c.channels; ++d)
            p[j] += at(n, 0, h, d, a.tokens[i]) * at(n, 1, h, d, a.tokens[group * length + j]) * a.scale;
          if (!a.bias.empty()) p[j] += a.bias[(size_t(h) * length + in_group) * length + j];
          if (!a.mask.empty()) p[j] += a.mask[(size_t(group) * length + in_group) * length + j];
        }
        const double most = *std::max_element(p.begin(), p.end());
        double sum = 0;
        for (double& v : p) sum += v = std::exp(v - most);
        for (int d = 0; d < c.channels; ++d) {
          double wanted = 0, largest = 0;
          for (int j = 0; j < length; ++j) {
            const double value = at(n, 2, h, d, a.tokens[group * length + j]);
            wanted += p[j] / sum * value;
            largest = std::max(largest, std::abs(value));
          }
          const double found = got.at(n, h * c.channels + d, a.tokens[i] / c.width, a.tokens[i] % c.width);
          if (std::isnan(wanted) || std::isnan(found))
            lost += std::isnan(wanted) != std::isnan(found);
          else
            worst = std::max(worst, std::abs(found - wanted) / largest);
        }
      }
  CHECK(lost == 0 && worst <= (type == Type::float32 ? 1e-5 : 1.0 / 256),
        "%s %s: %d heads of %d channels, %d of %d tokens: error %g, %d NaN", kernels.name, name(type), c.heads, c.channels,
        length, pixels, worst, lost);
}

void test_attention(const Kernels& kernels, Type type) {
  std::mt19937 random(3);
  const Case cases[] = {
      // count, height, width, length; heads, channels; joined, bias, mask, causal
      {1, 1, 1, 1, 1, 2, true, false, false, false},    {17, 1, 5, 5, 2, 4, true, false, false, false},
      {20, 1, 37, 37, 3, 16, false, false, false, false}, {33, 4, 6, 12, 2, 8, true, true, true, false},
      {40, 1, 70, 70, 1, 32, true, false, false, true}, {50, 7, 7, 49, 2, 6, true, true, false, false},
      {16, 3, 3, 1, 2, 10, false, false, true, false},  {18, 8, 8, 16, 1, 64, true, false, true, false},
  };
  for (const Case& c : cases) check_attention(kernels, type, c, random);
}

void test_gather(const Kernels& kernels, Type type) {
  std::mt19937 random(7);
  for (const int channels : {1, 4, 7}) {
    Tensor x({channels, 3, 4}, 19), y({channels, 2, 5}, 19);
    for (float& f : x.data) f = float(int(random() % 17) - 8);
    std::vector<int> from;
    std::vector<float> constant;
    for (int p = 0; p < 10; ++p) {
      from.push_back(int(random() % 13) - 1);
      for (int c = 0; c < channels; ++c) constant.push_back(float(int(random() % 17) - 8));
    }
    from[3] = -1;
    for (const bool added : {false, true}) {
      for (int n = 0; n < x.count; ++n)
        for (int c = 0; c < channels; ++c)
          for (int p = 0; p < 10; ++p)
            y.at(n, c, p / 5, p % 5) = (from[p] < 0 ? 0 : x.at(n, c, from[p] / 4, from[p] % 4)) +
                                       (added ? constant[p * channels + c] : 0);
      Conv sum;  // of all channels: the zero partner of an odd last one stays zero
      sum.outputs = 1;
      sum.weight.assign(channels, 1);
      Plan plan(type, kernels, x.shape);
      const int g = plan.gather(plan.input(), 2, 5, from, added ? constant : std::vector<float>{});
      plan.finish(plan.concat({g, plan.conv(g, sum)}));
      const Tensor got = outputs_of(plan, 3, x, 1), summed = specification::conv<double>(y, sum);
      const Tensor wanted = specification::concat({&y, &summed});
      CHECK(got.data == wanted.data, "%s %s: gather of %d channels", kernels.name, name(type), channels);
    }
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : available()) {
    for (const Type type : {Type::float32, Type::bfloat16}) {
      test_attention(*kernels, type);
      test_gather(*kernels, type);
    }
    printf("%s: done\n", kernels->name);
  }
  return report();
}
