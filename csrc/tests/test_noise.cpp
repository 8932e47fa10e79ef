// The noise on every instruction set that this machine has: published vectors, frozen results of the specification
// (correctnet/noise/specification.py), every one of the 2^32 words, and the vector code against the scalar one bit for
// bit.
//
//   test_noise DIRECTORY STRIDE    DIRECTORY of kat_*.txt; of the words, every STRIDE-th (an odd number; 1: all)
//
// Portable code is tested on every 61st word at most, as all of them would take minutes.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/noise_kernels.h"
#include "check.h"
#include "noise_cases.h"
#include "testing.h"

#if defined(CORRECTNET_X86)
#include <xmmintrin.h>
#endif

using namespace correctnet;

namespace {

const char* isa_name;  // that is being tested

std::vector<std::string> lines(const std::string& path) {
  std::ifstream file(path);
  CHECK(bool(file), "cannot read %s", path.c_str());
  std::vector<std::string> all;
  for (std::string line; std::getline(file, line);)
    if (!line.empty() && line[0] != '#') all.push_back(line);
  return all;
}

const NoiseCases& cases_of(Isa isa) {
  switch (isa) {
#if defined(CORRECTNET_X86)
    case Isa::avx2: return noise_cases_avx2;
    case Isa::avx512: return noise_cases_avx512;
    case Isa::avx512bf16: return noise_cases_avx512bf16;
#endif
    default: return noise_cases_portable;
  }
}

// Distance of z from the exact inverse of p, by a Newton step: independent of the table.
double normal_error(double z, double p) {
  const double density = std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
  return (0.5 * std::erfc(-z / std::sqrt(2.0)) - p) / density;
}

// ---- published and frozen answers -----------------------------------------------------------------------------------

void test_philox(const NoiseCases& cases, const std::string& directory) {
  int vectors = 0;
  for (const std::string& line : lines(directory + "/kat_philox.txt")) {
    uint32_t v[10];
    std::istringstream words(line);
    for (uint32_t& word : v) words >> std::hex >> word;
    CHECK(bool(words), "%s", line.c_str());
    const noise::Block scalar = noise::philox4x32({{v[0], v[1], v[2], v[3]}}, v[4] | uint64_t(v[5]) << 32);
    std::vector<uint32_t> vector(cases.step);
    cases.words({v[4] | uint64_t(v[5]) << 32, v[2], v[1], v[3], 0, 0}, v[0], vector.data());
    for (int i = 0; i < 4; ++i) {
      CHECK(scalar.word[i] == v[6 + i], "%s", line.c_str());
      CHECK(vector[i] == v[6 + i], "%s: %s", isa_name, line.c_str());
    }
    ++vectors;
  }
  CHECK(vectors == 3, "%d vectors", vectors);
}

void test_words(const NoiseCases& cases) {
  std::mt19937_64 random(1);
  std::vector<uint32_t> vector(cases.step);
  for (int i = 0; i < 20000; ++i) {
    const Noise noise{random(), uint32_t(random()), uint32_t(random()), uint32_t(random()), 0, 0};
    const uint32_t block = i % 2 ? uint32_t(random()) : uint32_t(-cases.step / 4);  // the last ones, too
    cases.words(noise, block, vector.data());
    for (int j = 0; j < cases.step; ++j) {
      const noise::Block drawn = noise::words(noise, block + j / 4);
      if (block + j / 4 >= block)
        CHECK(vector[j] == drawn.word[j % 4], "%s: word %d of block %u", isa_name, j, block);
    }
  }
}

// Lines of seed, layer, sample, purpose, sigma, shift, first element, and the bits of the factors from there on.
void test_frozen(const NoiseCases& cases, const std::string& directory) {
  int results = 0;
  for (const std::string& line : lines(directory + "/kat_lognormal.txt")) {
    std::istringstream words(line);
    uint64_t seed = 0;
    uint32_t layer = 0, sample = 0, purpose = 0;
    double sigma = 0, shift = 0;
    int64_t first = 0;
    words >> seed >> layer >> sample >> purpose >> sigma >> shift >> first >> std::hex;
    const Noise noise = noise::on_chip(lognormal_noise(layer, sigma, shift, purpose), seed, sample);
    std::vector<uint32_t> expected;
    for (uint32_t u; words >> u;) expected.push_back(u);
    std::vector<float> factors(expected.size());
    cases.fill_float32(nullptr, first, factors.size(), noise, factors.data());
    for (size_t i = 0; i < expected.size(); ++i)
      CHECK(noise::bits(factors[i]) == expected[i], "%s: %s: number %zu", isa_name, line.c_str(), i);
    results += int(expected.size());
  }
  CHECK(results >= 100, "%d results", results);
}

// Lines of kat_gaussian.txt and kat_faults.txt, whose heads say what is in them.
void test_frozen_arrays(const NoiseCases& cases, const std::string& path, int least) {
  int results = 0;
  for (const std::string& line : lines(path)) {
    std::istringstream words(line);
    uint64_t seed = 0;
    uint32_t layer = 0, sample = 0;
    std::string kind;
    double sigma = 0, shift = 0;
    int64_t first = 0;
    int sign = 0, any = 0;
    float reach = 0;
    Faults faults = {};
    words >> seed >> layer >> sample >> kind >> sigma >> shift >> first >> any >> sign >> reach >> faults.chip_gain >> faults.column_gain;
    for (int32_t& t : faults.threshold) words >> t;
    for (int i = 0; i < kOutcomes; ++i) words >> faults.keep[i];
    for (int i = 0; i < kOutcomes; ++i) words >> faults.move[i];
    CHECK(bool(words), "%s", line.c_str());
    faults.any = any;
    faults.sign = sign ? 0x80000000u : 0;
    const Noise made = kind == "gaussian" ? gaussian_noise(layer, faults) : spread_noise(layer, sigma, shift, faults);
    const Noise noise = noise::on_chip(made, seed, sample);
    std::vector<float> mean, spread;
    std::vector<uint32_t> expected;
    words >> std::hex;
    for (uint32_t m, s, w; words >> m >> s >> w;) {
      mean.push_back(noise::from_bits(m));
      spread.push_back(noise::from_bits(s));
      expected.push_back(w);
    }
    // Arrays begin at element 0, which may be far before the first one here.
    const std::vector<float> reaches = {reach};
    const auto origin = [&](const std::vector<float>& a) {
      return reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(a.data()) - sizeof(float) * uint64_t(first));
    };
    const Nominal nominal{origin(mean), origin(spread), reaches.data(), int64_t(1) << 35};
    std::vector<float> drawn(expected.size());
    std::vector<uint16_t> halves(expected.size());
    cases.draw_float32(nominal, first, drawn.size(), noise, drawn.data());
    cases.draw_bfloat16(nominal, first, drawn.size(), noise, halves.data());
    for (size_t i = 0; i < expected.size(); ++i) {
      CHECK(noise::bits(drawn[i]) == expected[i], "%s: %s: number %zu", isa_name, line.c_str(), i);
      CHECK(halves[i] == noise::bfloat16(drawn[i]), "%s: %s: bfloat16 %zu", isa_name, line.c_str(), i);
    }
    results += int(expected.size());
  }
  CHECK(results >= least, "%d results", results);
}

// ---- all words ------------------------------------------------------------------------------------------------------

// z of the even words 2 m ascends with m, is negative and bounded; z of the odd words 2 m + 1 is its negative.
void test_all_normals(const NoiseCases& cases, uint64_t stride) {
  constexpr int kBatch = 4096;
  std::vector<uint32_t> even(kBatch), odd(kBatch);
  std::vector<float> lower(kBatch), upper(kBatch);
  float last = -6.34f;
  for (uint64_t m = 0; m < 1ull << 31; m += kBatch * stride) {
    for (int i = 0; i < kBatch; ++i) {
      even[i] = uint32_t(std::min<uint64_t>(m + i * stride, (1u << 31) - 1)) << 1;
      odd[i] = even[i] | 1;
    }
    cases.normal(even.data(), kBatch, lower.data());
    cases.normal(odd.data(), kBatch, upper.data());
    int unordered = !(last <= lower[0]), unbounded = 0, unequal = 0;
    for (int i = 1; i < kBatch; ++i) unordered += !(lower[i - 1] <= lower[i]);
    for (int i = 0; i < kBatch; ++i) {
      unbounded += !(lower[i] < 0);
      unequal += !(upper[i] == -lower[i]);
    }
    CHECK(!unordered && !unbounded && !unequal, "%s: words from %u on: %d descend, %d not negative, %d not antisymmetric",
          isa_name, even[0], unordered, unbounded, unequal);
    last = lower.back();
  }
}

// On both sides of every border of the octaves, and at random between.
void test_normal_accuracy(const NoiseCases& cases) {
  std::vector<uint32_t> words;
  for (int k = 0; k <= 31; ++k)
    for (int64_t d = -4096; d <= 4096; ++d) {
      const int64_t m = std::min<int64_t>(std::max<int64_t>((int64_t(1) << k) + d, 0), (int64_t(1) << 31) - 1);
      words.push_back(uint32_t(m) << 1);
    }
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) words.push_back(uint32_t(random() >> random() % 31) & ~1u);
  words.resize((words.size() + 15) / 16 * 16);
  std::vector<float> z(words.size());
  cases.normal(words.data(), z.size(), z.data());
  double worst = 0;
  for (size_t i = 0; i < words.size(); ++i) {
    worst = std::max(worst, std::abs(normal_error(z[i], (words[i] / 2 + 0.5) * 0x1p-32)));
    CHECK(noise::bits(z[i]) == noise::bits(noise::normal(words[i], noise::kNormal)), "%s: word %u", isa_name, words[i]);
  }
  CHECK(worst < 6e-6, "%s: error %g", isa_name, worst);  // 5.7e-6, the table's, and float32's at |z| = 6
}

void test_exp2(const NoiseCases& cases, uint64_t stride) {
  std::vector<float> x;
  for (uint64_t u = 0; u <= noise::bits(126.0f); u += 1009 * std::min<uint64_t>(stride, 100))
    for (float sign : {1.0f, -1.0f}) x.push_back(sign * noise::from_bits(uint32_t(u)));
  for (int i = -252; i <= 252; ++i)  // where the rounding to an integer changes
    for (float f : {std::nextafter(i * 0.5f, -200.0f), i * 0.5f, std::nextafter(i * 0.5f, 200.0f)})
      x.push_back(std::min(126.0f, std::max(-126.0f, f)));
  x.resize((x.size() + 15) / 16 * 16);
  std::vector<float> y(x.size());
  cases.exp2(x.data(), x.size(), y.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp2(double(x[i]));
    CHECK(std::abs(y[i] - exact) <= 2.7e-7 * exact, "%s: exp2(%a) = %a", isa_name, x[i], y[i]);
    CHECK(x[i] != std::nearbyint(x[i]) || y[i] == exact, "%s: exp2(%a) = %a", isa_name, x[i], y[i]);
    CHECK(noise::bits(y[i]) == noise::bits(noise::exp2(x[i])), "%s: exp2(%a)", isa_name, x[i]);
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Any start, length and alignment gives the bits of the scalar functions, and nothing is written outside the range.
void test_fill(const NoiseCases& cases, int rounds) {
  constexpr float kGuard = 12345;
  std::mt19937_64 random(3);
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 3e38f, 1.2e-38f, -1e-40f};
  std::vector<float> weight(1200);
  for (float& w : weight) {
    w = float(int(random() % 2001) - 1000) / 500;
    if (random() % 20 == 0) w = special[random() % 8];
  }
  for (int round = 0; round < rounds; ++round) {
    const double sigma = 0.01 * (random() % 200), mean = 0.01 * (int(random() % 100) - 50);
    const Noise noise = noise::on_chip(lognormal_noise(uint32_t(random()), sigma, mean, uint32_t(random() % 3)), random(),
                                       uint32_t(random()));
    const int64_t count = random() % (round % 4 ? 70 : 1000), shift = random() % 40;
    const int64_t first = round % 3 ? random() % 1000 : (int64_t(1) << 34) - count - random() % 9;
    std::vector<float> factors(count + 2 * 64, kGuard), products = factors;
    std::vector<uint16_t> halves(count + 2 * 64, 0x4711);
    const float* row = weight.data() + shift;  // that of element `first`
    const float* base = reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(row) - first * sizeof(float));
    cases.fill_float32(nullptr, first, count, noise, &factors[64 - shift]);
    cases.fill_float32(base, first, count, noise, &products[64 - shift]);
    cases.fill_bfloat16(base, first, count, noise, &halves[64 - shift]);
    for (int64_t i = -64 + shift; i < count + 64 + shift; ++i) {
      const size_t at = 64 - shift + i;
      if (i < 0 || i >= count) {
        CHECK(factors[at] == kGuard && products[at] == kGuard && halves[at] == 0x4711, "%s: wrote outside the row",
              isa_name);
        continue;
      }
      const noise::Block drawn = noise::words(noise, uint32_t((first + i) / 4));
      const float factor = noise::lognormal(drawn.word[(first + i) % 4], noise, noise::kNormal);
      const float product = row[i] * factor;
      CHECK(noise::bits(factors[at]) == noise::bits(factor), "%s: factor %ld of %ld", isa_name, long(i), long(count));
      CHECK(noise::bits(products[at]) == noise::bits(product) || (product != product && products[at] != products[at]),
            "%s: product %ld of %ld", isa_name, long(i), long(count));
      CHECK(halves[at] == noise::bfloat16(product), "%s: bfloat16 %ld of %ld: %x, not %x", isa_name, long(i), long(count),
            halves[at], noise::bfloat16(product));
    }
  }
}

// The same for noise that reads arrays, of rows of any length.
void test_fill_arrays(const NoiseCases& cases, int rounds) {
  constexpr float kGuard = 12345;
  std::mt19937_64 random(6);
  for (int round = 0; round < rounds; ++round) {
    const std::vector<Noise> kinds = array_noises(uint32_t(random()));
    const Noise noise = noise::on_chip(kinds[round % kinds.size()], random(), uint32_t(random()));
    const int64_t row = 1 + random() % (round % 5 ? 40 : 500), rows = 1 + random() % 12, size = row * rows;
    const int64_t first = random() % size, count = random() % (size - first) + 1;
    std::vector<float> weight(size), reach(rows);
    for (float& w : weight) w = float(int(random() % 2001) - 1000) / 500;
    for (float& r : reach) r = float(random() % 1000) / 300;
    const std::vector<float> spread = random_spread(size, unsigned(random()));
    const Nominal nominal{weight.data(), spread.data(), reach.data(), row};
    std::vector<float> drawn(count + 2 * 64, kGuard);
    std::vector<uint16_t> halves(count + 2 * 64, 0x4711);
    cases.draw_float32(nominal, first, count, noise, &drawn[64]);
    cases.draw_bfloat16(nominal, first, count, noise, &halves[64]);
    for (int64_t i = -64; i < count + 64; ++i) {
      if (i < 0 || i >= count) {
        CHECK(drawn[64 + i] == kGuard && halves[64 + i] == 0x4711, "%s: wrote outside the row", isa_name);
        continue;
      }
      const float wanted = one_weight(nominal, noise, first + i);
      CHECK(noise::bits(drawn[64 + i]) == noise::bits(wanted), "%s: kind %u, faults %d, weight %ld of %ld: %a, not %a",
            isa_name, unsigned(noise.kind), noise.faults.any, long(i), long(count), drawn[64 + i], wanted);
      CHECK(halves[64 + i] == noise::bfloat16(wanted), "%s: kind %u, bfloat16 %ld of %ld", isa_name, unsigned(noise.kind),
            long(i), long(count));
      const bool exact = spread[first + i] == 0, spared = exact && noise::bits(spread[first + i]);
      CHECK(!exact || (noise.faults.any && !spared) || wanted == weight[first + i], "%s: an exact weight %a is %a", isa_name,
            weight[first + i], wanted);
    }
  }
}

// Against the C library, on products and sums that lie half way between two floats, or next to it.
void test_fma() {
  std::mt19937 random(5);
  for (int i = 0; i < 200000; ++i) {
    const float a = 1 + float(random() % 4096) * 0x1p-12f, b = 1 + float(random() % 4096) * 0x1p-12f;
    const float c = float(int(random() % 3) - 1) * std::ldexp(1.0f, -int(random() % 100));
    for (float sign : {1.0f, -1.0f}) {
      const float got = noise::fma(sign * a, b, c), exact = std::fma(sign * a, b, c);
      CHECK(got == exact, "fma(%a, %a, %a) = %a, not %a", sign * a, b, c, got, exact);
    }
  }
}

void test_bfloat16() {
  const auto check = [](float x, uint16_t expected) {
    CHECK(noise::bfloat16(x) == expected, "%a gives %x, not %x", x, noise::bfloat16(x), expected);
  };
  check(1.0f, 0x3f80);
  check(-0.0f, 0x8000);
  check(0x1.01p0f, 0x3f80);         // a tie goes to the even neighbour
  check(0x1.03p0f, 0x3f82);
  check(0x1.010002p0f, 0x3f81);
  check(0x1.fffffep127f, 0x7f80);   // rounds up to infinity
  check(-INFINITY, 0xff80);
  check(0x1p-126f, 0x0080);
  check(-0x1p-127f, 0x8000);        // subnormal
  check(noise::from_bits(0x7f800001), 0x7fc0);
}

// ---- tensors --------------------------------------------------------------------------------------------------------

// The functions for tensors: any number of threads and either memory order give the results of one row at a time.
void test_tensors() {
  std::mt19937_64 random(4);
  for (const WeightShape shape : {WeightShape{7, 9, 5, false}, WeightShape{64, 9, 130, false},
                                  WeightShape{3, 1, 50000, true}, WeightShape{0, 9, 5, true},
                                  WeightShape{300, 25, 6, true}, WeightShape{5, 4, 1, false}}) {
    const Noise noise = noise::on_chip(lognormal_noise(3, 0.5, -0.125), random(), 4);
    const int64_t size = shape.taps * shape.channels, count = shape.rows * size;
    std::vector<float> weight(count), factors(count), all(count), out(count);
    std::vector<uint16_t> halves(count);
    for (float& w : weight) w = float(int(random() % 2001) - 1000) / 500;
    noise_cases_portable.fill_float32(nullptr, 0, count, noise, factors.data());
    for (int threads : {1, 2, 5}) {
      lognormal(noise, 0, count, all.data(), threads);
      CHECK(all == factors, "%s: factors with %d threads", isa_name, threads);
      noisy_weight(noise, shape, {weight.data()}, out.data(), threads);
      noisy_weight(noise, shape, {weight.data()}, halves.data(), threads);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = i / size, place = i % size;  // (channels, taps) in memory, (taps, channels) as elements
        const int64_t element =
            shape.channels_last ? i : row * size + place % shape.taps * shape.channels + place / shape.taps;
        const float product = weight[i] * factors[element];
        CHECK(out[i] == product, "%s: weight %ld with %d threads", isa_name, long(i), threads);
        CHECK(halves[i] == noise::bfloat16(product), "%s: weight %ld with %d threads", isa_name, long(i), threads);
      }
    }
  }
}

// The same for noise that reads arrays, which must be there and in the order of elements.
void test_tensors_of_arrays() {
  std::mt19937_64 random(7);
  for (const Noise& kind : array_noises(3))
    for (const WeightShape shape : {WeightShape{64, 9, 130, true}, WeightShape{300, 25, 6, true}, WeightShape{3, 1, 50000, false}}) {
      const Noise noise = noise::on_chip(kind, random(), 4);
      const int64_t row = shape.taps * shape.channels, count = shape.rows * row;
      std::vector<float> weight(count), reach(shape.rows), out(count);
      std::vector<uint16_t> halves(count);
      for (float& w : weight) w = float(int(random() % 2001) - 1000) / 500;
      for (float& r : reach) r = float(random() % 1000) / 300;
      const std::vector<float> spread = random_spread(count);
      const Nominal nominal{weight.data(), spread.data(), reach.data(), row};
      for (int threads : {1, 2, 5}) {
        noisy_weight(noise, shape, {weight.data(), spread.data(), reach.data()}, out.data(), threads);
        noisy_weight(noise, shape, {weight.data(), spread.data(), reach.data()}, halves.data(), threads);
        int wrong = 0;
        for (int64_t i = 0; i < count; ++i) {
          const float wanted = one_weight(nominal, noise, i);
          wrong += noise::bits(out[i]) != noise::bits(wanted) || halves[i] != noise::bfloat16(wanted);
        }
        CHECK(wrong == 0, "%s: %d weights from arrays with %d threads", isa_name, wrong, threads);
      }
      int refused = 0;
      const auto refuses = [&](const WeightShape& other, const Nominal& arrays) {
        try {
          noisy_weight(noise, other, arrays, out.data(), 1);
        } catch (const std::invalid_argument&) {
          ++refused;
        }
      };
      refuses({1, 9, 5, false}, nominal);
      refuses(shape, {weight.data(), nullptr, reach.data()});
      if (noise.faults.any) refuses(shape, {weight.data(), spread.data(), nullptr});
      CHECK(refused == 2 + noise.faults.any, "%s: %d refusals", isa_name, refused);
    }
}

void test_selection() {
  const Isa before = selected_isa();
  for (const std::string bad : {"", "avx9", "AVX2"}) {
    bool refused = false;
    try {
      select_isa(bad);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    CHECK(refused && selected_isa() == before, "'%s' was taken", bad.c_str());
  }
}

}  // namespace

// fast-math among the linker flags would change this for the whole process.
void test_subnormals() {
  volatile float tiny = 1e-40f, one = 1;
  CHECK(tiny * one > 0, "subnormal numbers are zeros");
}

int main(int argc, char** argv) {
  const std::string directory = argc > 1 ? argv[1] : "";
  const uint64_t stride = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  if (stride % 2 == 0) {
    fprintf(stderr, "usage: test_noise DIRECTORY STRIDE (odd)\n");
    return 2;
  }
  test_subnormals();
  test_fma();
  test_bfloat16();
  test_selection();
  for (const Isa isa : supported_isas()) {
    isa_name = name(isa);
    select_isa(isa_name);
    const NoiseCases& cases = cases_of(isa);
    test_philox(cases, directory);
    test_words(cases);
    test_frozen(cases, directory);
    test_all_normals(cases, isa == Isa::portable ? std::max<uint64_t>(stride, 61) : stride);
    test_normal_accuracy(cases);
    test_exp2(cases, stride);
    test_fill(cases, stride == 1 ? 5000 : 300);
    test_frozen_arrays(cases, directory + "/kat_gaussian.txt", 90);
    test_frozen_arrays(cases, directory + "/kat_faults.txt", 170);
    test_fill_arrays(cases, stride == 1 ? 5000 : 300);
#if defined(CORRECTNET_X86)
    _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormal results and operands to zero, as torch.set_flush_denormal does
    test_frozen(cases, directory);
    test_fill(cases, 300);
    test_frozen_arrays(cases, directory + "/kat_faults.txt", 170);
    _mm_setcsr(_mm_getcsr() & ~0x8040u);
#endif
    test_tensors();
    test_tensors_of_arrays();
    printf("%s: done\n", isa_name);
  }
  return report();
}
