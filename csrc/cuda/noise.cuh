// Noise on the device: noise.h with its table in shared memory, and kernels that write the noisy weights of many chip
// samples to memory.
#pragma once

#include "cuda/bf16.cuh"
#include "cuda/chips.h"

namespace correctnet {
namespace cuda {

constexpr int kTableFloats = (noise::kDegree + 1) * noise::kOctaves;

CN_CONSTANT float kNormalTable[kTableFloats] = {
#include "noise/normal_table.inc"
};

// Copies the table of `noise::normal` to shared memory. Entry j * 32 + octave lies in bank `octave`, so lanes with
// different octaves have no bank conflicts and lanes with the same octave read one word; constant memory would
// serialise octaves.
CN_DEVICE void copy_normal_table(float* shared, int threads) {
  for (int i = int(threadIdx.x); i < kTableFloats; i += threads) shared[i] = kNormalTable[i];
}

// A layer's noise on chip number `chip` of the launch.
CN_DEVICE Noise on_chip(const Noise& noise, const Chips& chips, int chip) {
  return noise::on_chip(noise, *chips.seed, chips.samples[chip]);
}

// The factors of elements 4 block ... 4 block + 3, which share one Philox block. `table`: from copy_normal_table.
CN_DEVICE void four_factors(const Noise& noise, const float* table, uint32_t block, float (&factor)[4]) {
  const noise::Block words = noise::words(noise, block);
#pragma unroll
  for (int i = 0; i < 4; ++i) factor[i] = noise::lognormal(words.word[i], noise, table);
}

// ---- noisy weights in memory ----------------------------------------------------------------------------------------

struct NoisyWeightArguments {
  Noise noise;
  Chips chips;
  const float* weight;  // null: ones
  void* out;            // (samples, rows, ...)
  WeightShape shape;
  int tile_taps, tile_channels;  // noisy_weight_transposed
};

constexpr int kWeightThreads = 256, kMostTile = 64;  // channels and taps of a tile, at most

constexpr size_t in_order_shared_bytes() { return kTableFloats * 4; }
constexpr size_t transposed_shared_bytes(int taps, int channels) { return (kTableFloats + size_t(taps) * channels) * 4; }
// Without asking for more, a block has 48 KiB.
static_assert(transposed_shared_bytes(kMostTile, kMostTile) <= (48 << 10), "");

// out[sample][e] = weight[e] * factor(e) where memory is in the order that elements count in, (out, kh, kw, in). A
// thread computes the four weights of a Philox block, so that a warp reads 512 contiguous bytes. Grid: (blocks,
// samples).
template <class T>
CN_KERNEL(kWeightThreads, 2) noisy_weight_in_order(CN_ARGUMENTS(NoisyWeightArguments) p) {
  float* table = reinterpret_cast<float*>(shared_memory());
  copy_normal_table(table, kWeightThreads);
  if (!CN_MUTANT(7)) __syncthreads();
  const int sample = int(blockIdx.y);
  const Noise noise = on_chip(p.noise, p.chips, sample);
  const int64_t size = p.shape.rows * p.shape.taps * p.shape.channels;
  T* const out = static_cast<T*>(p.out) + sample * size;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) | reinterpret_cast<uintptr_t>(p.weight) % 16) == 0;
  for (int64_t block = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x; 4 * block < size;
       block += int64_t(gridDim.x) * kWeightThreads) {
    float factor[4], w[4] = {1, 1, 1, 1};
    four_factors(noise, table, uint32_t(block), factor);
    const bool whole = aligned && 4 * block + 4 <= size;
    if (p.weight) {
      if (whole) {
        load_four(p.weight + 4 * block, w);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (4 * block + i < size) w[i] = p.weight[4 * block + i];
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

// The same where memory is (out, in, kh, kw). A block computes the factors of one output, `tile_channels` channels and
// `tile_taps` taps in the order of elements, stores them in shared memory, and multiplies in the order of memory, so
// that accesses are coalesced. Neighbouring threads draw neighbouring taps, which lie in neighbouring banks. Grid:
// (tiles, samples).
template <class T>
CN_KERNEL(kWeightThreads, 2) noisy_weight_transposed(CN_ARGUMENTS(NoisyWeightArguments) p) {
  float* table = reinterpret_cast<float*>(shared_memory());
  float* tile = table + kTableFloats;
  copy_normal_table(table, kWeightThreads);
  if (!CN_MUTANT(8)) __syncthreads();
  const int sample = int(blockIdx.y);
  const Noise noise = on_chip(p.noise, p.chips, sample);
  const int64_t channel_tiles = (p.shape.channels + p.tile_channels - 1) / p.tile_channels;
  const int64_t tap_tiles = (p.shape.taps + p.tile_taps - 1) / p.tile_taps;
  const int64_t row = blockIdx.x / (channel_tiles * tap_tiles);
  const int64_t channel = blockIdx.x / tap_tiles % channel_tiles * p.tile_channels;
  const int64_t tap = blockIdx.x % tap_tiles * p.tile_taps;
  const int channels = int(p.shape.channels - channel < p.tile_channels ? p.shape.channels - channel : p.tile_channels);
  const int taps = int(p.shape.taps - tap < p.tile_taps ? p.shape.taps - tap : p.tile_taps);

  // The channels of a tap are consecutive elements; their first may lie inside a Philox block.
  const int blocks = channels / 4 + 2;
  for (int i = int(threadIdx.x); i < taps * blocks; i += kWeightThreads) {
    const int t = i % taps;
    const int64_t first = (row * p.shape.taps + tap + t) * p.shape.channels + channel;
    const int c = 4 * (i / taps) - int(first % 4);
    if (c >= channels) continue;
    float factor[4];
    four_factors(noise, table, uint32_t((first + c) / 4), factor);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (c + j >= 0 && c + j < channels) tile[(c + j) * taps + t] = factor[j];
  }
  if (!CN_MUTANT(9)) __syncthreads();
  const int64_t size = p.shape.rows * p.shape.taps * p.shape.channels;
  for (int i = int(threadIdx.x); i < channels * taps; i += kWeightThreads) {
    const int64_t at = (row * p.shape.channels + channel + i / taps) * p.shape.taps + tap + i % taps;
    const float w = p.weight ? p.weight[at] : 1.0f;
    static_cast<T*>(p.out)[sample * size + at] = from_float<T>(rounded_weight<T>(noise::multiply(w, tile[i])));
  }
}

struct ArrayWeightArguments {
  Noise noise;
  Chips chips;
  const float *weight, *spread, *reach;  // (rows, row), (rows, row) and, where devices are stuck, (rows)
  void* out;                             // (samples, rows, row)
  int64_t size, row;
};

// The weights of noise that is no factor, in the order of elements; a thread computes those of a Philox block. The kind
// is the same for all threads. Grid: (blocks, samples).
template <class T>
CN_KERNEL(kWeightThreads, 2) array_weight(CN_ARGUMENTS(ArrayWeightArguments) p) {
  float* table = reinterpret_cast<float*>(shared_memory());
  copy_normal_table(table, kWeightThreads);
  __syncthreads();
  const int sample = int(blockIdx.y);
  const Noise noise = on_chip(p.noise, p.chips, sample);
  const bool gains = noise.faults.chip_gain != 0 || noise.faults.column_gain != 0;
  T* const out = static_cast<T*>(p.out) + sample * p.size;
  for (int64_t block = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x; 4 * block < p.size;
       block += int64_t(gridDim.x) * kWeightThreads) {
    const noise::Block words = noise::words(noise, uint32_t(block));
    noise::Block fault = {};
    if (noise.faults.any) fault = noise::words(noise::for_purpose(noise, kFault), uint32_t(block));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t e = 4 * block + i;
      if (e >= p.size) continue;
      const float weight = p.weight[e], spread = p.spread[e];
      float value = noise::spread_weight(noise::normal(words.word[i], table), weight, spread, noise);
      if (noise.faults.any) {
        const int64_t output = e / p.row;
        const float gain = gains ? noise::gain(noise, output, table) : 1.0f;
        value = noise::faulty_weight(value, weight, spread, p.reach[output], gain, fault.word[i], noise.faults);
      }
      out[e] = from_float<T>(rounded_weight<T>(value));
    }
  }
}

}  // namespace cuda
}  // namespace correctnet
