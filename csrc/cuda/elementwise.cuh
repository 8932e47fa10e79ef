// The memory-bound operations: pooling, pointwise functions, concatenation, layout changes and counting. Each element
// is read and written once: a thread processes four channels (of an NHWC tensor) where four are aligned, else one, and
// neighbouring threads process neighbouring ones. Grid: (blocks, samples); `stride`s are distances from sample to
// sample, 0 for what all samples share.
#pragma once

#include "cpu/kernels.h"
#include "cuda/conv.cuh"

namespace correctnet {
namespace cuda {

constexpr int kElementwiseThreads = 256;

template <int kCount, class T>
CN_DEVICE void load(const T* p, float (&a)[kCount]) {
  if constexpr (kCount == 4)
    load_four(p, a);
  else
    a[0] = to_float(*p);
}

template <int kCount, class T>
CN_DEVICE void store(T* p, const float (&a)[kCount]) {
  if constexpr (kCount == 4)
    store_four(p, a);
  else
    *p = from_float<T>(a[0]);
}

// Calls f(i) for 0 <= i < count, each once in the whole grid row.
template <class F>
CN_DEVICE void for_each(int64_t count, const F& f) {
  // The step is not a variable, which would take registers.
  for (int64_t i = int64_t(blockIdx.x) * kElementwiseThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kElementwiseThreads)
    f(i);
}

// y[pixel][c] over the window rows[h], cols[w]; the mean's divisor is 0 for the size of the window. In the order of the
// CPU's kernels, so that float32 is the same.
struct PoolArguments {
  const void* x;
  void* y;
  int64_t x_stride, y_stride, pixels;  // of y, all images
  int channels, in_h, in_w, out_h, out_w;
  const Taps *rows, *cols;
  bool average;
  int divisor;
};

template <class T, int kCount>
CN_KERNEL(kElementwiseThreads, 4) pool(CN_ARGUMENTS(PoolArguments) p) {
  const T* const x = static_cast<const T*>(p.x) + blockIdx.y * p.x_stride;
  T* const y = static_cast<T*>(p.y) + blockIdx.y * p.y_stride;
  const int vectors = p.channels / kCount;
  for_each(p.pixels * vectors, [&](int64_t i) {
    const int64_t pixel = i / vectors, image = pixel / (p.out_h * p.out_w);
    const int place = int(pixel % (p.out_h * p.out_w)), c = int(i % vectors) * kCount;
    const Taps row = p.rows[place / p.out_w], col = p.cols[place % p.out_w];
    float sum[kCount] = {}, a[kCount];
    bool first = true;
    for (int h = row.start; h < row.start + row.last - row.first; ++h)
      for (int w = col.start; w < col.start + col.last - col.first; ++w, first = false) {
        load<kCount>(x + ((image * p.in_h + h) * p.in_w + w) * p.channels + c, a);
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          sum[j] = first ? a[j] : p.average ? sum[j] + a[j] : max_or_nan(sum[j], a[j]);
      }
    if (p.average) {
      const float size = float(p.divisor ? p.divisor : (row.last - row.first) * (col.last - col.first));
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] /= size;
    }
    store<kCount>(y + pixel * p.channels + c, sum);
  });
}

// y = epilogue(a + b), or epilogue(a) where b is null
struct PointwiseArguments {
  const void *a, *b;
  void* y;
  int64_t a_stride, b_stride, y_stride, pixels;
  int channels;
  Channelwise epilogue;
};

template <class T, int kCount>
CN_KERNEL(kElementwiseThreads, 4) pointwise(CN_ARGUMENTS(PointwiseArguments) p) {
  const T* const a = static_cast<const T*>(p.a) + blockIdx.y * p.a_stride;
  const T* const b = p.b ? static_cast<const T*>(p.b) + blockIdx.y * p.b_stride : nullptr;
  T* const y = static_cast<T*>(p.y) + blockIdx.y * p.y_stride;
  const int vectors = p.channels / kCount;
  for_each(p.pixels * vectors, [&](int64_t i) {
    float sum[kCount], other[kCount];
    load<kCount>(a + i * kCount, sum);
    if (b) {
      load<kCount>(b + i * kCount, other);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += other[j];
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum[j] = apply(p.epilogue, int(i % vectors) * kCount + j, sum[j]);
    store<kCount>(y + i * kCount, sum);
  });
}

// One part of a concatenation: y[pixel][first + c] = x[pixel][c]
struct ConcatArguments {
  const void* x;
  void* y;
  int64_t x_stride, y_stride, pixels;
  int channels, first, y_channels;
};

template <class T, int kCount>
CN_KERNEL(kElementwiseThreads, 4) concat(CN_ARGUMENTS(ConcatArguments) p) {
  const T* const x = static_cast<const T*>(p.x) + blockIdx.y * p.x_stride;
  T* const y = static_cast<T*>(p.y) + blockIdx.y * p.y_stride + p.first;
  const int vectors = p.channels / kCount;
  for_each(p.pixels * vectors, [&](int64_t i) {
    float a[kCount];
    load<kCount>(x + i * kCount, a);
    store<kCount>(y + i / vectors * p.y_channels + i % vectors * kCount, a);
  });
}

// Turns the columns under a kernel row into channels: (h, w, c) -> (h, out_w, (kw, c)), zeros where there is padding.
struct UnfoldArguments {
  const void* x;
  void* y;
  int64_t pixels;  // of y, all images
  int channels, in_w, out_w, kernel_w, dilation_w;
  const Taps* cols;
};

template <class T>
CN_KERNEL(kElementwiseThreads, 4) unfold(CN_ARGUMENTS(UnfoldArguments) p) {
  const int channels = p.kernel_w * p.channels;
  for_each(p.pixels * channels, [&](int64_t i) {
    const int64_t pixel = i / channels;
    const int tap = int(i % channels) / p.channels, c = int(i % p.channels);
    const Taps taps = p.cols[pixel % p.out_w];
    const bool inside = taps.first <= tap && tap < taps.last;
    const int64_t col = taps.start + (tap - taps.first) * p.dilation_w;
    static_cast<T*>(p.y)[i] =
        inside ? static_cast<const T*>(p.x)[(pixel / p.out_w * p.in_w + col) * p.channels + c] : T(0);
  });
}

// (images, h, w, c) <-> (images, c, h, w), for the input, a flattened tensor and the output. Reads are not coalesced,
// but images have few channels there (the input) or few pixels (the other two), so that caches compensate for it.
struct TransposeArguments {
  const void* x;
  void* y;
  int64_t x_stride, y_stride, images;
  int channels, pixels;  // of an image
  bool to_channels_last;
};

template <class In, class Out>
CN_KERNEL(kElementwiseThreads, 4) transpose(CN_ARGUMENTS(TransposeArguments) p) {
  const In* const x = static_cast<const In*>(p.x) + blockIdx.y * p.x_stride;
  Out* const y = static_cast<Out*>(p.y) + blockIdx.y * p.y_stride;
  const int fast = p.to_channels_last ? p.channels : p.pixels, slow = p.to_channels_last ? p.pixels : p.channels;
  const int64_t size = int64_t(fast) * slow;
  for_each(p.images * size, [&](int64_t i) {
    const int64_t image = i / size, place = i % size;
    y[i] = from_float<Out>(to_float(x[image * size + place % fast * slow + place / fast]));
  });
}

// Adds to correct[sample] the number of images on which none of `classes` outputs is NaN and the first of the largest
// ones is the label's, and to nonfinite[sample], if wanted, the number with a NaN or infinite output. One warp an
// image.
struct CountArguments {
  const void* x;  // (samples, images, classes)
  int64_t x_stride, images;
  int classes;
  const int64_t* labels;
  unsigned long long *correct, *nonfinite;
};

constexpr unsigned kNan = 1, kInfinite = 2;

template <class T>
CN_KERNEL(kElementwiseThreads, 4) count_correct(CN_ARGUMENTS(CountArguments) p) {
  const T* const x = static_cast<const T*>(p.x) + blockIdx.y * p.x_stride;
  const int lane = int(threadIdx.x) % 32, warps = kElementwiseThreads / 32;
  unsigned correct = 0, nonfinite = 0;  // of one warp
  for (int64_t image = int64_t(blockIdx.x) * warps + threadIdx.x / 32; image < p.images; image += int64_t(gridDim.x) * warps) {
    float largest = -INFINITY;
    int best = 0x7fffffff;
    unsigned found = 0;  // kNan, kInfinite
    for (int c = lane; c < p.classes; c += 32) {
      const float a = to_float(x[image * p.classes + c]);
      found |= a != a ? kNan : fabsf(a) == INFINITY ? kInfinite : 0;
      if (a > largest || (a == largest && c < best)) largest = a, best = c;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = shuffle_xor(largest, lanes);
      const int other_best = shuffle_xor(best, lanes);
      if (other > largest || (other == largest && other_best < best)) largest = other, best = other_best;
      found |= shuffle_xor(found, lanes);
    }
    correct += !(found & kNan) && best == p.labels[image];
    nonfinite += found != 0;
  }
  if (lane == 0 && correct) atomicAdd(p.correct + blockIdx.y, correct);
  if (lane == 0 && nonfinite && p.nonfinite) atomicAdd(p.nonfinite + blockIdx.y, nonfinite);
}

}  // namespace cuda
}  // namespace correctnet
