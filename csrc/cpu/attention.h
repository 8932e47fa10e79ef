// Attention of several heads on the lanes of lanes.h: for every head and group of pixels, its tokens,
//
//     y_i = sum_j p_ij v_j,    p_i = softmax_j(scale * q_i . k_j + bias_ij)
//
// Queries, keys and values of a head are first copied to float32 tiles, in both types: kMaxVectors queries, 6 keys, and
// 6 channels of the values. A tile of scores, and then of results, is kMaxVectors x 6 sums in registers, as in a
// convolution, but every factor is a vector. Sums are accumulated in the order of channels, and of keys. Internal linkage.
#pragma once

#include "cpu/conv.h"
#include "cpu/pack.h"

namespace correctnet {
namespace {

constexpr int kKeys = 6;  // of a tile

template <int N>
struct Size {
  static constexpr int value = N;
};

// exp(x) for x <= 0; at most 2^-125 where it is less.
CN_INLINE Lanes exp_of_negative(Lanes x) {
  const Exponential e = exponential(clamp(x, splat(-87), zero()));
  return fma(e.power, e.tail, e.power);
}

// How the channels of a head are laid out in tiles: `width` channels of `count` tokens.
//   of tokens:   [tile of tokens][channel][token of the tile][16], missing tokens being zeros
//   of channels: [tile of channels][token][channel of the tile][16]
template <class Math>
struct HeadReader {
  const AttentionJob& job;
  const int* tokens;
  int block;

  template <class Place>
  CN_INLINE void read(const char* x, int slots, int channel, int first, int count, float scale, float* out,
                      const Place& place) const {
    const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes, pixel = slots * slot;
    const Lanes factor = splat(scale);
    for (int i = 0; i < count; ++i) {
      const char* p = x + tokens[first + i] * pixel + channel / Math::kChannels * slot + block * kVectorBytes;
      for (int d = 0; d < job.width; d += Math::kChannels, p += slot) {
        const Slot<Math> s = load_slot<Math>(p);
        for (int c = 0; c < Math::kChannels; ++c) store(out + place(i, d + c) * kLanes, mul(s.a[c], factor));
      }
    }
  }

  void of_tokens(const char* x, int slots, int channel, int first, int count, int tile, float scale, float* out) const {
    const int width = job.width;
    read(x, slots, channel, first, count, scale, out,
         [=](int i, int d) { return (ptrdiff_t(i / tile) * width + d) * tile + i % tile; });
    for (int i = count; i % tile; ++i)
      for (int d = 0; d < width; ++d) store(out + ((ptrdiff_t(i / tile) * width + d) * tile + i % tile) * kLanes, zero());
  }

  void of_channels(const char* x, int slots, int channel, int count, float* out) const {
    const int width = job.width;
    read(x, slots, channel, 0, count, 1, out, [=](int i, int d) {
      const int first = d / kKeys * kKeys, tile = minimum(kKeys, width - first);
      return ptrdiff_t(first) * count + i * tile + d - first;
    });
  }
};

// sum[v][c], over i < length, of a[i][v] b[i][c], for the queries v of a tile.
template <int NC>
CN_INLINE void products(const float* a, const float* b, int length, Lanes (&sum)[kMaxVectors][NC]) {
  constexpr int NV = kMaxVectors;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) sum[v][c] = zero();
  for (int i = 0; i < length; ++i, a += NV * kLanes, b += NC * kLanes) {
    Lanes left[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) left[v] = load(a + v * kLanes);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      const Lanes right = load(b + c * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v][c] = fma(left[v], right, sum[v][c]);
    }
  }
}

// scores[key][query] of a tile: the products over the channels.
CN_INLINE void score_tile(const float* queries, const float* keys, int width, int count, float* scores) {
  constexpr int NV = kMaxVectors;
  Lanes sum[NV][kKeys];
  products<kKeys>(queries, keys, width, sum);
#pragma GCC unroll 6
  for (int c = 0; c < kKeys; ++c)
    if (c < count)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(scores + (c * NV + v) * kLanes, sum[v][c]);
}

// Turns the scores of a tile of queries, `first` being the first, into exp(score - largest), and returns 1 / their sums.
CN_INLINE void softmax_tile(const AttentionJob& job, const float* bias, const float* mask, int first, float* scores,
                            Lanes (&inverse)[kMaxVectors]) {
  constexpr int NV = kMaxVectors;
  Lanes largest[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const ptrdiff_t row = ptrdiff_t(minimum(first + v, job.length - 1)) * job.length;
    for (const float* added : {bias, mask})
      for (int j = 0; added && j < job.length; ++j) {
        float* score = scores + (j * NV + v) * kLanes;
        store(score, add(load(score), splat(added[row + j])));
      }
    largest[v] = load(scores + v * kLanes);
    inverse[v] = zero();
  }
  for (int j = 1; j < job.length; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) largest[v] = max(largest[v], load(scores + (j * NV + v) * kLanes));
  for (int j = 0; j < job.length; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* score = scores + (j * NV + v) * kLanes;
      const Lanes p = exp_of_negative(sub(load(score), largest[v]));
      store(score, p);
      inverse[v] = add(inverse[v], p);
    }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) inverse[v] = div(splat(1), inverse[v]);
}

// The results of a tile of queries, for NC channels from `channel` on.
template <class Math, int NC>
CN_INLINE void result_tile(const AttentionJob& job, int block, const int* tokens, int count, int channel,
                           const float* scores, const float* values, const float* inverse) {
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes, pixel = job.out_slots * slot;
  Lanes sum[kMaxVectors][NC];
  products<NC>(scores, values, job.length, sum);  // over the keys
#pragma GCC unroll 4
  for (int v = 0; v < kMaxVectors; ++v) {
    if (v >= count) break;
    char* y = job.y + tokens[v] * pixel + channel / Math::kChannels * slot + block * kVectorBytes;
    const Lanes by = load(inverse + v * kLanes);
#pragma GCC unroll 6
    for (int c = 0; c < NC; c += Math::kChannels, y += slot) {
      Slot<Math> s;
      for (int k = 0; k < Math::kChannels; ++k) s.a[k] = mul(sum[v][c + k], by);
      store_slot<Math>(y, s);
    }
  }
}

template <class Math>
void attention(const AttentionJob& job) {
  constexpr int NV = kMaxVectors;
  const int length = job.length, width = job.width;
  float* keys = reinterpret_cast<float*>(job.scratch);
  float* values = keys + ptrdiff_t(length + kKeys - 1) / kKeys * kKeys * width * kLanes;
  float* queries = values + ptrdiff_t(length) * width * kLanes;
  float* scores = queries + ptrdiff_t(kAttentionQueries) * width * kLanes;  // [tile of queries][key][query][16]
  alignas(kVectorBytes) float inverse[kAttentionQueries][kLanes];
  const ptrdiff_t square = ptrdiff_t(length) * length;
  for (int block = 0; block < job.image_blocks; ++block)
    for (int group = 0; group < job.groups; ++group)
      for (int head = 0; head < job.heads; ++head) {
        const int* tokens = job.tokens + ptrdiff_t(group) * length;
        const HeadReader<Math> reader{job, tokens, block};
        const float* bias = job.bias ? job.bias + head * square : nullptr;
        const float* mask = job.mask ? job.mask + group * square : nullptr;
        const int channel = head * width;
        reader.of_tokens(job.k, job.k_slots, job.k_first + channel, 0, length, kKeys, 1, keys);
        reader.of_channels(job.v, job.v_slots, job.v_first + channel, length, values);
        for (int first = 0; first < length; first += kAttentionQueries) {
          const int count = minimum(int(kAttentionQueries), length - first);
          reader.of_tokens(job.q, job.q_slots, job.q_first + channel, first, count, NV, job.scale, queries);
          for (int j = 0; j < length; j += kKeys)
            for (int i = 0; i < count; i += NV)
              score_tile(queries + ptrdiff_t(i) * width * kLanes, keys + ptrdiff_t(j) * width * kLanes, width,
                         length - j, scores + (ptrdiff_t(i) * length + ptrdiff_t(j) * NV) * kLanes);
          for (int i = 0; i < count; i += NV) {
            Lanes by[NV];
            softmax_tile(job, bias, mask, first + i, scores + ptrdiff_t(i) * length * kLanes, by);
            for (int v = 0; v < NV; ++v) store(inverse[i + v], by[v]);
          }
          for (int c = 0; c < width; c += kKeys)
            for (int i = 0; i < count; i += NV) {
              const auto tile = [&](auto size) {
                result_tile<Math, decltype(size)::value>(job, block, tokens + first + i, count - i, channel + c,
                                                         scores + ptrdiff_t(i) * length * kLanes,
                                                         values + ptrdiff_t(c) * length * kLanes, inverse[i]);
              };
              switch (width - c) {
                case 2: tile(Size<2>()); break;
                case 4: tile(Size<4>()); break;
                default: tile(Size<kKeys>()); break;
              }
            }
        }
      }
}

}  // namespace
}  // namespace correctnet
