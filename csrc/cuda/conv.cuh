// Convolution with noisy weights as an implicit GEMM: forward, and backward with respect to the input.
//
//     y[m][n] = epilogue(sum over k of x[m][k] * w[n][k])        m: output pixels of all images     n: output channels
//                                                                k: (tap, channel), the order in which noise counts
//
// x is gathered from an NHWC tensor, never unfolded in memory. Backward is the same sum: m counts pixels of the input,
// n its channels, k counts (tap, output), and the weight of (n, k) is that of (output, tap, n), noise included.
//
// Tiles: 256 pixels x 64 channels for a block of 256 threads (16 channels for layers with at most 16), K in slices of
// 64 bytes. float32: 8 x 8 results a thread with FMA; bfloat16: 64 x 32 results a warp with mma.m16n8k16; both with 64
// (16) sums a thread. The tile is tall because of the noise: a weight takes some 60 instructions (Philox, quintic,
// exponential), as many as 60 pixels take with FMA, and many hundred pixels with tensor cores. Hence
//   - a block keeps the noisy weights of all slices in shared memory where they fit (K up to about 1300 in bfloat16 with
//     the 228 KB of sm_90) and sweeps the images with them: noise is drawn once for thousands of pixels;
//   - otherwise it draws a slice again for each tile of 256 pixels, a quarter as often as with 64 x 256 tiles; running the
//     engine with `materialise` avoids that at the price of a copy of the weights in memory.
// The grid is (sweeping blocks, tiles of n in all groups, samples), so all samples of a layer are one launch, and
// blocks that read the same images at the same time share them in the second-level cache.
//
// Shared memory. A slice of x is 256 rows of 64 bytes, a slice of w 64 (16) such rows. The 16-byte chunk c of row r is
// stored at c ^ (r / 2 % 4): then eight rows of one chunk, which ldmatrix reads at a time (as do the eight lanes that
// share a phase of a 16-byte load in float32), cover all 32 banks once, and so do two whole rows, which eight lanes of
// cp.async write. kStages slices of x are in flight: two are being copied while one is multiplied.
//
// Rows are permuted inside a tile (x_row, w_row) such that the sums of a thread are neighbouring pixels and
// neighbouring channels: whole 2 x 2 pool windows, and 16 contiguous bytes of bfloat16, without any exchange of
// registers.
#pragma once

#include "cpu/kernels.h"
#include "cuda/noise.cuh"

namespace correctnet {
namespace cuda {

constexpr int kConvThreads = 256, kTileRows = 256, kStages = 3, kSliceBytes = 64;
constexpr int kStageBytes = kTileRows * kSliceBytes;

// n / divisor for 0 <= n < 2^31 by a multiplication: floor(2^(31 + shift) / divisor) + 1 with 2^shift >= divisor is
// exact there (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t divisor = 1, magic = 0x80000001;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    magic = uint32_t((uint64_t(1) << (31 + shift)) / d + 1);
  }
  CN_HOST_DEVICE int divide(int n) const { return int((uint64_t(uint32_t(n)) * magic) >> (31 + shift)); }
};

// One spatial axis of the gather. Output position i meets input position (i * step + origin + tap * spacing) / divisor
// where that is whole and inside 0 ... size - 1.
struct Axis {
  int size, step, origin, spacing, divisor;
};

// Channel-wise arrays of `Pointwise`; null: ones or zeros.
struct Channelwise {
  const float *scale, *shift, *after_scale, *after_shift;
  bool relu;
  Converter adc, dac;
};

struct ConvArguments {
  const void* x;       // (samples or one, images, h, w, x_channels)
  const void* weight;  // float32 with noise, else as x
  void* y;             // (samples, images, h, w, y_channels)
  int64_t x_stride, weight_stride, y_stride;  // from sample to sample
  Axis h, w;
  int x_channels, y_channels;  // of all groups
  int in, out;                 // x and y channels of a group
  int taps, k, slices;         // k = taps * in
  Divisor by_in, by_kernel_w, by_quads;
  int rows, tiles;     // of y before pooling, and of 256 of them
  int out_h, out_w;    // of y, after pooling
  int column_tiles;    // of a group
  int x_bytes;         // of a copy, so that it is aligned and within one tap: 16, 8, 4 or 2
  int weight_bytes;    // likewise; 0: the weights pass through registers
  int quads;           // groups of four consecutive weights that cover a line of a slice
  bool resident;       // all slices of w stay in shared memory
  bool transposed;     // backward
  bool channels_last;  // `weight` is (outputs, taps, inputs), else (outputs, inputs, taps)
  bool weight_vectors, y_vectors;  // whether 16 bytes at a time are aligned
  bool noisy, pool, float_out;
  Noise noise;
  Chips chips;
  Channelwise epilogue;
};

// A pixel of the tile: first pixel of its image, and the row and column under tap (0, 0).
struct Pixel {
  int image, h, w;
};

constexpr size_t conv_shared_bytes(int columns, int weight_slices) {
  return kTableFloats * 4 + 2 * kTileRows * sizeof(Pixel) + kStages * kStageBytes +
         size_t(weight_slices) * columns * kSliceBytes;
}

// The least that a launch needs fits the 99 KiB of compute capability 8.6 and 8.9.
static_assert(conv_shared_bytes(64, kStages) <= (99 << 10), "");

// Offset of a chunk in a slice. Eight rows further down, the chunk is at the same place of its row.
CN_HOST_DEVICE int swizzled(int row, int chunk) { return row * kSliceBytes + ((chunk ^ (row >> 1 & 3)) << 4); }

// ---- the two ways to multiply -------------------------------------------------------------------------------------
//
// x_row, w_row: the row of a slice that holds pixel (channel) i of the tile. A thread computes kRows pixels from
// first_row on and kColumns channels from first_column on.

template <class T, int kN>
struct Tile;

// float32: threads are arranged as 32 x 8. Operands are 8 rows of x and kN / 8 of w, 16 bytes along k at a time: as
// many loads as with the transposed layout usual for outer products, but cp.async can write 16 bytes at a time.
template <int kN>
struct Tile<float, kN> {
  static constexpr int kRows = 8, kColumns = kN / 8;
  float sum[kRows][kColumns];

  static CN_DEVICE int x_row(int i) { return i % kRows * 32 + i / kRows; }
  static CN_DEVICE int w_row(int i) { return i % kColumns * 8 + i / kColumns; }
  static CN_DEVICE int first_row() { return int(threadIdx.x) / 8 * kRows; }
  static CN_DEVICE int first_column() { return int(threadIdx.x) % 8 * kColumns; }
  CN_DEVICE float& at(int row, int column) { return sum[row][column]; }

  CN_DEVICE void multiply(const char* x, const char* w) {
    const int tm = int(threadIdx.x) / 8, tn = int(threadIdx.x) % 8;
#pragma unroll
    for (int chunk = 0; chunk < kSliceBytes / 16; ++chunk) {
      float4 b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        b[j] = *vector_at<float4>(w + swizzled(tn, chunk) + 8 * j * kSliceBytes);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 a = *vector_at<float4>(x + swizzled(tm, chunk) + 32 * i * kSliceBytes);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = noise::fma(a.x, b[j].x, sum[i][j]);
          sum[i][j] = noise::fma(a.y, b[j].y, sum[i][j]);
          sum[i][j] = noise::fma(a.z, b[j].z, sum[i][j]);
          sum[i][j] = noise::fma(a.w, b[j].w, sum[i][j]);
        }
      }
    }
  }
};

// bfloat16: warps are arranged as 4 x 2 (8 x 1 for 16 channels), each with kMs x kNs fragments of 16 x 8. Lane l holds
// rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1 of each.
template <int kN>
struct Tile<uint16_t, kN> {
  static constexpr int kWarpsN = kN / 32 > 0 ? kN / 32 : 1, kWarpsM = 8 / kWarpsN;
  static constexpr int kMs = kTileRows / kWarpsM / 16, kNs = kN / kWarpsN / 8;
  static constexpr int kRows = 2 * kMs, kColumns = 2 * kNs;
  float sum[kMs][kNs][4];

  static CN_DEVICE int x_row(int i) {
    return i / (16 * kMs) * (16 * kMs) + i / 2 % kMs * 16 + i % 2 * 8 + i / kRows % 8;
  }
  static CN_DEVICE int w_row(int i) { return i / (8 * kNs) * (8 * kNs) + i / 2 % kNs * 8 + i / kColumns % 4 * 2 + i % 2; }
  static CN_DEVICE int warp() { return int(threadIdx.x) / 32; }
  static CN_DEVICE int lane() { return int(threadIdx.x) % 32; }
  static CN_DEVICE int first_row() { return warp() / kWarpsN * 16 * kMs + lane() / 4 * kRows; }
  static CN_DEVICE int first_column() { return warp() % kWarpsN * 8 * kNs + lane() % 4 * kColumns; }
  CN_DEVICE float& at(int row, int column) { return sum[row / 2][column / 2][row % 2 * 2 + column % 2]; }

  CN_DEVICE void multiply(const char* x, const char* w) {
    x += warp() / kWarpsN * 16 * kMs * kSliceBytes;
    w += warp() % kWarpsN * 8 * kNs * kSliceBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the slice: 16 k
      // a: rows 0-7 and 8-15 of k 0-7, then of k 8-15. b: k 0-7 and 8-15 of columns 0-7, then of columns 8-15.
      const int a_row = CN_MUTANT(4) ? lane() / 2 : lane() % 16, a_chunk = 2 * half + lane() / 16;
      const int b_row = lane() % 8 + lane() / 16 * 8, b_chunk = 2 * half + lane() / 8 % 2;
      uint32_t b[kNs / 2][4];
#pragma unroll
      for (int j = 0; j < kNs / 2; ++j) ldmatrix(b[j], w + swizzled(b_row, b_chunk) + 16 * j * kSliceBytes);
#pragma unroll
      for (int i = 0; i < kMs; ++i) {
        uint32_t a[4];
        ldmatrix(a, x + swizzled(a_row, a_chunk) + 16 * i * kSliceBytes);
#pragma unroll
        for (int j = 0; j < kNs; ++j)
          mma(sum[i][j], a, b[j / 2][j % 2 * 2 + CN_MUTANT(3)], b[j / 2][j % 2 * 2 + !CN_MUTANT(3)]);
      }
    }
  }
};

// ---- global to shared memory ----------------------------------------------------------------------------------------

template <class T, int kN>
CN_DEVICE void find_pixels(const ConvArguments& p, int tile, Pixel* pixels) {
  const int i = int(threadIdx.x), row = tile * kTileRows + i;
  Pixel pixel = {0, -(1 << 30), 0};  // outside of every image
  if (row < p.rows) {
    // With a pool, four consecutive rows are a window.
    const int place = p.pool ? row / 4 : row, area = p.out_h * p.out_w;
    int h = place % area / p.out_w, w = place % p.out_w;
    if (p.pool) {
      h = 2 * h + row / 2 % 2;
      w = 2 * w + row % 2;
    }
    pixel = {place / area * p.h.size * p.w.size, h * p.h.step + p.h.origin, w * p.w.step + p.w.origin};
  }
  pixels[Tile<T, kN>::x_row(i)] = pixel;
}

// Whether an input position exists; where the gather divides (backward with a stride), it is replaced by the quotient.
CN_DEVICE bool inside(const Axis& axis, int& position) {
  if (axis.divisor > 1) {
    const int quotient = position / axis.divisor;
    if (quotient * axis.divisor != position) return false;
    position = quotient;
  }
  return unsigned(position) < unsigned(axis.size);
}

// cp.async has no copy of two bytes (an odd number of bfloat16 channels).
template <int kBytes>
CN_DEVICE void copy(void* shared, const void* source, bool valid) {
  if constexpr (kBytes >= 4)
    cp_async<kBytes>(shared, source, valid);
  else
    *static_cast<uint16_t*>(shared) = valid ? *static_cast<const uint16_t*>(source) : 0;
}

// A slice of x. Neighbouring threads copy neighbouring channels; a thread has the same k in all its rows.
template <class T, int kBytes>
CN_DEVICE void load_x(const ConvArguments& p, const T* x, const Pixel* pixels, int slice, char* stage) {
  constexpr int kCopies = kSliceBytes / kBytes, kStep = kConvThreads / kCopies;
  const int byte = int(threadIdx.x) % kCopies * kBytes;
  const int k = (slice * kSliceBytes + byte) / int(sizeof(T));
  const int tap = p.by_in.divide(k), channel = k - tap * p.in, tap_h = p.by_kernel_w.divide(tap);
  const int h_offset = tap_h * p.h.spacing, w_offset = (tap - tap_h * int(p.by_kernel_w.divisor)) * p.w.spacing;
#pragma unroll 4
  for (int row = int(threadIdx.x) / kCopies; row < kTileRows; row += kStep) {
    const Pixel pixel = pixels[row];
    int h = pixel.h + h_offset, w = pixel.w + w_offset;
    const bool valid = inside(p.h, h) && inside(p.w, w) && k < p.k;
    const T* source = valid ? x + int64_t(pixel.image + h * p.w.size + w) * p.x_channels + channel : x;
    copy<kBytes>(stage + swizzled(row, byte / 16) + byte % 16, source, valid);
  }
}

template <class T>
CN_DEVICE void load_x(const ConvArguments& p, const T* x, const Pixel* pixels, int slice, char* stage) {
  switch (p.x_bytes) {
    case 16: return load_x<T, 16>(p, x, pixels, slice, stage);
    case 8: return load_x<T, 8>(p, x, pixels, slice, stage);
    case 4: return load_x<T, 4>(p, x, pixels, slice, stage);
    default: return load_x<T, 2>(p, x, pixels, slice, stage);
  }
}

// A slice of weights without noise, in the order of memory.
template <class T, int kN, int kBytes>
CN_DEVICE void copy_weights(const ConvArguments& p, const T* weight, int column, int slice, char* stage) {
  constexpr int kCopies = kSliceBytes / kBytes;
  const int byte = int(threadIdx.x) % kCopies * kBytes;
  const int k = (slice * kSliceBytes + byte) / int(sizeof(T));
  for (int n = int(threadIdx.x) / kCopies; n < kN; n += kConvThreads / kCopies) {
    const bool valid = column + n < p.out && k < p.k;
    cp_async<kBytes>(stage + swizzled(Tile<T, kN>::w_row(n), byte / 16) + byte % 16,
                     valid ? weight + int64_t(column + n) * p.k + k : weight, valid);
  }
}

// A slice of weights that are made noisy or only rearranged. A line is a run of consecutive elements: all k of one n,
// or backward all n of one k. A thread processes the four elements of a Philox block; a line may begin with any of
// them. Weights outside the matrix are set to zero: x is zero there, but zero times NaN is not.
template <class T, int kN>
CN_DEVICE void make_weights(const ConvArguments& p, const T* weight, const Noise& noise, const float* table,
                            int group, int column, int slice, char* stage) {
  constexpr int kK = kSliceBytes / int(sizeof(T));
  const int lines = p.transposed ? kK : kN, length = p.transposed ? kN : kK;
  for (int i = int(threadIdx.x); i < lines * p.quads; i += kConvThreads) {
    const int line = p.by_quads.divide(i), quad = i - line * p.quads;
    const int k = slice * kK + (p.transposed ? line : 0);
    const int n = column + (p.transposed ? 0 : CN_MUTANT(5) ? Tile<T, kN>::w_row(line) : line);
    const int tap = p.by_in.divide(k);
    const int64_t output = p.transposed ? group * p.in + k - tap * p.in : group * p.out + n;
    const int64_t first = p.transposed ? (output * p.taps + tap) * p.out + n : output * p.k + k;  // element
    const int begin = 4 * quad - int(first & 3);
    int end = p.transposed ? p.out - n : p.k - k;  // of the line's elements inside the matrix
    if (end > length) end = length;
    if (p.transposed ? k >= p.k : n >= p.out) end = 0;

    float value[4] = {0, 0, 0, 0};
    if (begin < end && begin + 4 > 0) {
      if (p.noisy) four_factors(noise, table, uint32_t((first + begin) >> 2), value);
      const float* nominal = reinterpret_cast<const float*>(weight);
      if (p.weight_vectors && begin >= 0 && begin + 4 <= end) {
        const float4 w = *vector_at<float4>(nominal + first + begin);
        value[0] = rounded_weight<T>(noise::multiply(w.x, value[0]));
        value[1] = rounded_weight<T>(noise::multiply(w.y, value[1]));
        value[2] = rounded_weight<T>(noise::multiply(w.z, value[2]));
        value[3] = rounded_weight<T>(noise::multiply(w.w, value[3]));
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = begin + j;
          int64_t offset = first + at;
          if (!p.channels_last) {
            const int t = p.transposed ? tap : p.by_in.divide(k + at);
            const int inputs = p.transposed ? p.out : p.in, input = p.transposed ? n + at : k + at - t * p.in;
            offset = (output * inputs + input) * p.taps + t;
          }
          if (at < 0 || at >= end)
            value[j] = 0;
          else
            value[j] = p.noisy ? rounded_weight<T>(noise::multiply(nominal[offset], value[j]))
                               : to_float(weight[offset]);
        }
      }
    }

    if (!p.transposed && begin % 4 == 0) {
      if (begin < length) {
        char* to = stage + swizzled(Tile<T, kN>::w_row(line), begin * int(sizeof(T)) / 16) + begin * int(sizeof(T)) % 16;
        store_four(reinterpret_cast<T*>(to), value);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = begin + j;
        if (at < 0 || at >= length) continue;
        const int row = Tile<T, kN>::w_row(p.transposed ? at : line);
        const int byte = (p.transposed ? line : at) * int(sizeof(T));
        *reinterpret_cast<T*>(stage + swizzled(row, byte / 16) + byte % 16) = from_float<T>(value[j]);
      }
    }
  }
}

template <class T, int kN>
CN_DEVICE void load_weights(const ConvArguments& p, const T* weight, const Noise& noise, const float* table,
                            int group, int column, int slice, char* stage) {
  const T* of_group = weight + int64_t(group) * p.out * p.k;
  switch (p.weight_bytes) {
    case 16: return copy_weights<T, kN, 16>(p, of_group, column, slice, stage);
    case 8: return copy_weights<T, kN, 8>(p, of_group, column, slice, stage);
    case 4: return copy_weights<T, kN, 4>(p, of_group, column, slice, stage);
    default: return make_weights<T, kN>(p, weight, noise, table, group, column, slice, stage);
  }
}

// ---- shared to global memory ----------------------------------------------------------------------------------------

// As on the CPU: adding 1.5 * 2^23 rounds to whole numbers. NaN stays NaN.
CN_DEVICE float converted(const Converter& c, float a) {
  a = noise::multiply(a, c.inverse);
  a = a < -c.steps ? -c.steps : a;
  a = a > c.steps ? c.steps : a;
  return (a + 12582912.0f) - 12582912.0f;
}

CN_DEVICE float apply(const Channelwise& e, int channel, float a) {
  if (e.adc.inverse != 0) a = converted(e.adc, a);
  a = noise::fma(a, e.scale ? e.scale[channel] : 1.0f, e.shift ? e.shift[channel] : 0.0f);
  if (e.relu) a = a < 0 ? 0 : a;  // propagates NaN, as in torch
  if (e.after_scale) a = noise::fma(a, e.after_scale[channel], e.after_shift[channel]);
  if (e.dac.inverse != 0) a = converted(e.dac, a);
  return a;
}

// `count` numbers of one pixel.
template <class T, int kCount>
CN_DEVICE void store_channels(T* to, const float (&value)[kCount], int count, bool vectors) {
  if (vectors) {
    if constexpr (kCount >= 4) {
#pragma unroll
      for (int j = 0; j < kCount; j += 4) store_four(to + j, &value[j]);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (j < count) to[j] = from_float<T>(value[j]);
}

// Where scales may be negative the pool is not the same before as after the epilogue, so it comes after, as defined.
template <class T, int kN>
CN_DEVICE void store_tile(const ConvArguments& p, Tile<T, kN>& sums, int tile, int group, int column, int64_t y) {
  constexpr int kRows = Tile<T, kN>::kRows, kColumns = Tile<T, kN>::kColumns;
  const int first = column + Tile<T, kN>::first_column(), count = p.out - first;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (j < count) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums.at(i, j) = apply(p.epilogue, group * p.out + first + j, sums.at(i, j));
    }
  int row = tile * kTileRows + Tile<T, kN>::first_row(), rows = p.rows, stored = kRows;
  if (p.pool) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        sums.at(i, j) = max_or_nan(max_or_nan(sums.at(4 * i, j), sums.at(4 * i + 1, j)),
                                   max_or_nan(sums.at(4 * i + 2, j), sums.at(4 * i + 3, j)));
    row /= 4, rows /= 4, stored /= 4;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= stored || row + i >= rows || count <= 0) continue;
    float value[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) value[j] = sums.at(i, j);
    const int64_t at = y + int64_t(row + i) * p.y_channels + group * p.out + first;
    if (p.float_out)
      store_channels(static_cast<float*>(p.y) + at, value, count, p.y_vectors);
    else
      store_channels(static_cast<T*>(p.y) + at, value, count, p.y_vectors);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T, int kN>
CN_KERNEL(kConvThreads, 1) conv(CN_ARGUMENTS(ConvArguments) p) {
  char* const x_stages = shared_memory();
  char* const w_stages = x_stages + kStages * kStageBytes;
  Pixel* const pixels = reinterpret_cast<Pixel*>(w_stages + (p.resident ? p.slices : kStages) * kN * kSliceBytes);
  float* const table = reinterpret_cast<float*>(pixels + 2 * kTileRows);
  const int group = int(blockIdx.y) / p.column_tiles, column = int(blockIdx.y) % p.column_tiles * kN;
  const int sample = int(blockIdx.z);
  const T* const x = static_cast<const T*>(p.x) + sample * p.x_stride + group * p.in;
  const T* const weight = static_cast<const T*>(p.weight) + sample * p.weight_stride;

  Noise noise = {};
  if (p.noisy) {
    noise = on_chip(p.noise, p.chips, sample);
    copy_normal_table(table, kConvThreads);
    if (!CN_MUTANT(6)) __syncthreads();
  }
  // One group of copies a slice of x, and with the first one all of the weights that stay.
  if (p.resident)
    for (int slice = 0; slice < p.slices; ++slice)
      load_weights<T, kN>(p, weight, noise, table, group, column, slice, w_stages + slice * kN * kSliceBytes);

  // The slice to load next. The places of its pixels were found at least one barrier ago, and the other half of
  // `pixels` is free again, since all loads of the tile before were issued before the last barrier.
  int tile = int(blockIdx.x), slice = 0, half = 0, load_stage = 0;
  find_pixels<T, kN>(p, tile, pixels);

  // And the slice to multiply, kStages - 1 turns later.
  int current = tile, multiplied = 1 - kStages, stage = 0;
  Tile<T, kN> sums = {};
  while (current < p.tiles) {
    cp_async_wait<CN_MUTANT(2) ? kStages : kStages - 2>();
    if (!CN_MUTANT(1)) __syncthreads();  // the slice to multiply is there, and the stage to load into has been read
    if (tile < p.tiles) {
      load_x<T>(p, x, pixels + half * kTileRows, slice, x_stages + load_stage * kStageBytes);
      if (!p.resident)
        load_weights<T, kN>(p, weight, noise, table, group, column, slice, w_stages + load_stage * kN * kSliceBytes);
      if (++slice == p.slices) {
        slice = 0;
        half ^= 1;
        tile += int(gridDim.x);
        if (tile < p.tiles) find_pixels<T, kN>(p, tile, pixels + half * kTileRows);
      }
    }
    cp_async_commit();  // an empty group at the end keeps the count of those that are pending
    load_stage = load_stage == kStages - 1 ? 0 : load_stage + 1;
    if (multiplied >= 0) {
      sums.multiply(x_stages + stage * kStageBytes, w_stages + (p.resident ? multiplied : stage) * kN * kSliceBytes);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (++multiplied == p.slices) {
      store_tile<T, kN>(p, sums, current, group, column, sample * p.y_stride);
      sums = {};
      multiplied = 0;
      current += int(gridDim.x);
    }
  }
}

}  // namespace cuda
}  // namespace correctnet
