// Noise on the device: noise.h as it is, its table in shared memory, and kernels that make the noisy weights of many chip
// samples as tensors.
#pragma once

#include "numbers.cuh"

namespace correctnet {
namespace cuda {

// The noise of one layer; seed and samples stand in device memory.
struct LayerFactors {
  const uint64_t* seed;
  const uint32_t* samples;
  uint32_t layer, purpose;
  noise::Log2Scale log2;
};

constexpr int kTableFloats = (noise::kDegree + 1) * noise::kOctaves;

CN_CONSTANT float kNormalTable[kTableFloats] = {
#include "../../correctnet/noise/normal_table.inc"
};

// A copy of the table for `noise::normal`. Entry j * 32 + octave lies in bank `octave`, so lanes with different octaves
// never meet in a bank, and lanes with the same one read one word; constant memory would take a turn for every octave.
CN_DEVICE void copy_normal_table(float* shared, int threads) {
  for (int i = int(threadIdx.x); i < kTableFloats; i += threads) shared[i] = kNormalTable[i];
}

// The factors of elements 4 block ... 4 block + 3, which share one Philox block.
struct Factors {
  const float* table = nullptr;
  noise::Log2Scale log2 = {};
  Noise noise = {};

  Factors() = default;
  CN_DEVICE Factors(const LayerFactors& f, int sample, const float* table)
      : table(table), log2(f.log2), noise{*f.seed, f.layer, f.samples[sample], 0, 0, f.purpose} {}

  CN_DEVICE void four(uint32_t block, float (&factor)[4]) const {
    const noise::Block words = noise::words(noise, block);
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = noise::lognormal(words.word[i], log2, table);
  }
};

// ---- noisy weights as tensors ---------------------------------------------------------------------------------------

struct NoisyWeightArguments {
  LayerFactors noise;
  const float* weight;    // null: ones
  int64_t weight_stride;  // from sample to sample; 0: the same for all
  void* out;              // (samples, rows, ...)
  int64_t rows, taps, channels;
  int tile_taps, tile_channels;  // noisy_weight_transposed
};

constexpr int kWeightThreads = 256, kMostTile = 64;  // channels and taps of a tile, at most

constexpr size_t in_order_shared_bytes() { return kTableFloats * 4; }
constexpr size_t transposed_shared_bytes(int taps, int channels) { return (kTableFloats + size_t(taps) * channels) * 4; }
// Without asking for more, a block has 48 KiB.
static_assert(transposed_shared_bytes(kMostTile, kMostTile) <= (48 << 10), "");

// out[sample][e] = weight[e] * factor(e) where memory is in the order that elements count, (out, kh, kw, in). A thread
// makes the four numbers of a Philox block, so that a warp reads 512 bytes in a row. Grid: (blocks, samples).
template <class T>
CN_KERNEL(kWeightThreads, 2) noisy_weight_in_order(CN_ARGUMENTS(NoisyWeightArguments) p) {
  float* table = reinterpret_cast<float*>(shared_memory());
  copy_normal_table(table, kWeightThreads);
  if (!CN_MUTANT(7)) __syncthreads();
  const int sample = int(blockIdx.y);
  const Factors factors(p.noise, sample, table);
  const int64_t size = p.rows * p.taps * p.channels;
  T* const out = static_cast<T*>(p.out) + sample * size;
  const float* const weight = p.weight ? p.weight + sample * p.weight_stride : nullptr;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) | reinterpret_cast<uintptr_t>(weight) % 16) == 0;
  for (int64_t block = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x; 4 * block < size;
       block += int64_t(gridDim.x) * kWeightThreads) {
    float factor[4], w[4] = {1, 1, 1, 1};
    factors.four(uint32_t(block), factor);
    const bool whole = aligned && 4 * block + 4 <= size;
    if (weight) {
      if (whole) {
        load_four(weight + 4 * block, w);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (4 * block + i < size) w[i] = weight[4 * block + i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = rounded_weight<T>(noise::multiply(w[i], factor[i]));
    if (whole) {
      store_four(out + 4 * block, w);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (4 * block + i < size) out[4 * block + i] = from_float<T>(w[i]);
    }
  }
}

// The same where memory is (out, in, kh, kw). A block makes the factors of one output, `tile_channels` channels and
// `tile_taps` taps in the order of elements, leaves them in shared memory, and multiplies in the order of memory, so that
// weights are read and written in a row. Neighbouring threads draw neighbouring taps, which lie in neighbouring banks.
// Grid: (tiles, samples).
template <class T>
CN_KERNEL(kWeightThreads, 2) noisy_weight_transposed(CN_ARGUMENTS(NoisyWeightArguments) p) {
  float* table = reinterpret_cast<float*>(shared_memory());
  float* tile = table + kTableFloats;
  copy_normal_table(table, kWeightThreads);
  if (!CN_MUTANT(8)) __syncthreads();
  const int sample = int(blockIdx.y);
  const Factors factors(p.noise, sample, table);
  const int64_t channel_tiles = (p.channels + p.tile_channels - 1) / p.tile_channels;
  const int64_t tap_tiles = (p.taps + p.tile_taps - 1) / p.tile_taps;
  const int64_t row = blockIdx.x / (channel_tiles * tap_tiles);
  const int64_t channel = blockIdx.x / tap_tiles % channel_tiles * p.tile_channels;
  const int64_t tap = blockIdx.x % tap_tiles * p.tile_taps;
  const int channels = int(p.channels - channel < p.tile_channels ? p.channels - channel : p.tile_channels);
  const int taps = int(p.taps - tap < p.tile_taps ? p.taps - tap : p.tile_taps);

  // The channels of a tap are consecutive elements; their first may lie inside a Philox block.
  const int blocks = channels / 4 + 2;
  for (int i = int(threadIdx.x); i < taps * blocks; i += kWeightThreads) {
    const int t = i % taps;
    const int64_t first = (row * p.taps + tap + t) * p.channels + channel;
    const int c = 4 * (i / taps) - int(first % 4);
    if (c >= channels) continue;
    float factor[4];
    factors.four(uint32_t((first + c) / 4), factor);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (c + j >= 0 && c + j < channels) tile[(c + j) * taps + t] = factor[j];
  }
  if (!CN_MUTANT(9)) __syncthreads();
  const int64_t size = p.rows * p.taps * p.channels;
  for (int i = int(threadIdx.x); i < channels * taps; i += kWeightThreads) {
    const int64_t at = (row * p.channels + channel + i / taps) * p.taps + tap + i % taps;
    const float w = p.weight ? p.weight[sample * p.weight_stride + at] : 1.0f;
    static_cast<T*>(p.out)[sample * size + at] = from_float<T>(rounded_weight<T>(noise::multiply(w, tile[i])));
  }
}

}  // namespace cuda
}  // namespace correctnet
