#include "noise_cases.h"

#include "noise/noise_fill.h"

namespace correctnet {
namespace {

using namespace noise;

#if defined(__AVX2__)

void draw_words(const Noise& noise, uint32_t block, uint32_t* out) {
  Ints blocks[2], drawn[4];
  for (int g = 0; g < 2; ++g) blocks[g] = add64(splat64(uint64_t(block) + g * kVector / 2), lane_blocks());
  philox<2>(Schedule(noise), blocks, drawn);
  memcpy(out, drawn, sizeof drawn);
}

void draw_normal(const uint32_t* words, int64_t count, float* out) {
  const Table table;
  for (int64_t i = 0; i < count; i += kVector) store(out + i, normal(load(words + i), table));
}

void draw_exp2(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kVector) store(out + i, exp2(load(x + i)));
}

#else

constexpr int kVector = 1;

void draw_words(const Noise& noise, uint32_t block, uint32_t* out) {
  const Block drawn = words(noise, block);
  memcpy(out, drawn.word, sizeof drawn.word);
}

void draw_normal(const uint32_t* words, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = normal(words[i], kNormal);
}

void draw_exp2(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = exp2(x[i]);
}

#endif

void fill_float32(const float* weight, int64_t first, int64_t count, const Noise& noise, float* out) {
  noise_fill(weight, first, count, noise, out);
}

void fill_bfloat16(const float* weight, int64_t first, int64_t count, const Noise& noise, uint16_t* out) {
  noise_fill(weight, first, count, noise, out);
}

void draw_float32(const Nominal& nominal, int64_t first, int64_t count, const Noise& noise, float* out) {
  noise_fill(nominal, first, count, noise, out);
}

void draw_bfloat16(const Nominal& nominal, int64_t first, int64_t count, const Noise& noise, uint16_t* out) {
  noise_fill(nominal, first, count, noise, out);
}

}  // namespace

const NoiseCases CN_TABLE = {4 * kVector,  draw_words,    draw_normal,  draw_exp2,
                             fill_float32, fill_bfloat16, draw_float32, draw_bfloat16};

}  // namespace correctnet
