// Convolutions whose groups have one channel and one output each: every channel is a vector operation of its own, so
// that there are no tiles of several outputs. Weights are packed in their natural order (channel, tap), in float32 in
// both types, and sums are accumulated in the order (kernel row, kernel column), as in conv.h. Internal linkage.
#pragma once

#include "cpu/conv.h"
#include "cpu/pack.h"

namespace correctnet {
namespace {

template <class Math>
size_t depthwise_bytes(const ConvShape& shape) {
  const size_t pairs = (shape.channels + Math::kChannels - 1) / Math::kChannels * Math::kChannels;
  const size_t bytes = pairs * shape.kernel_h * shape.kernel_w * sizeof(float);
  return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

template <class Math>
void depthwise_pack(const PackJob& job) {
  const ConvShape& shape = *job.shape;
  const int count = shape.channels * shape.kernel_h * shape.kernel_w;
  float* out = reinterpret_cast<float*>(job.packed);
  for (int first = 0; first < count; first += kPiece) {
    const int size = minimum(kPiece, count - first);
    if constexpr (Math::kChannels == 1) {
      draw(job, first, size, out + first);
    } else {
      uint16_t drawn[kPiece];
      draw(job, first, size, drawn);
      for (int i = 0; i < size; ++i) out[first + i] = noise::from_bits(uint32_t(drawn[i]) << 16);
    }
  }
  memset(out + count, 0, depthwise_bytes<Math>(shape) - count * sizeof(float));
}

// The slots of NV image vectors, `in` apart in x and `out_step` apart in y, at one pixel.
template <class Math, Activation A, int NV>
CN_INLINE void depthwise_pixels(const ConvJob& job, Taps rows, Taps cols, const char* x, ptrdiff_t in, char* y,
                                ptrdiff_t out_step) {
  const ConvShape& shape = *job.shape;
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes, pixel = shape.in_slots * slot;
  const ptrdiff_t right = shape.dilation_w * pixel, down = ptrdiff_t(shape.dilation_h) * shape.in_w * pixel;
  const int taps = shape.kernel_h * shape.kernel_w;
  const float* weights = reinterpret_cast<const float*>(job.packed) + rows.first * shape.kernel_w;
  for (int s = 0; s < shape.in_slots; ++s, x += slot, weights += Math::kChannels * taps) {
    Slot<Math> sum[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      for (int c = 0; c < Math::kChannels; ++c) sum[v].a[c] = zero();
    for (int ky = 0; ky < rows.last - rows.first; ++ky) {
      const char* p = x + ky * down;
      const float* w = weights + ky * shape.kernel_w;
      for (int kx = cols.first; kx < cols.last; ++kx, p += right) {
        Lanes weight[Math::kChannels];
        for (int c = 0; c < Math::kChannels; ++c) weight[c] = splat(w[c * taps + kx]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const Slot<Math> image = load_slot<Math>(p + v * in);
          for (int c = 0; c < Math::kChannels; ++c) sum[v].a[c] = fma(image.a[c], weight[c], sum[v].a[c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int first = s * Math::kChannels;
      for (int c = 0; c < Math::kChannels; ++c) {
        Lanes& a = sum[v].a[c];
        a = before(job.epilogue, first + c, a);
        a = A == Activation::none ? piecewise(job.epilogue, a) : curve<A>(a);
        a = after(job.epilogue, first + c, a);
      }
      store_channels<Math, Math::kChannels>(job, y + v * out_step, first, shape.outputs - first, sum[v].a);
    }
  }
}

CN_INLINE bool same_taps(const Taps* taps, int count) {
  for (int i = 1; i < count; ++i)
    if (taps[i].first != taps[0].first || taps[i].last != taps[0].last) return false;
  return true;
}

template <class Math, Activation A>
void depthwise_with(const ConvJob& job) {
  const ConvShape& shape = *job.shape;
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes;
  const ptrdiff_t pixel = shape.in_slots * slot, out_pixel = job.out_slots * slot;
  constexpr int kColumns = kMaxVectors == 4 ? 4 : 2;
  for (int row = 0; row < shape.out_h; ++row) {
    const Taps rows = shape.rows[row];
    for (int col = 0, columns; col < shape.out_w; col += columns) {
      const Taps cols = shape.cols[col];
      columns = col + kColumns <= shape.out_w && same_taps(shape.cols + col, kColumns) ? kColumns : 1;
      const char* x = job.x + (ptrdiff_t(rows.start) * shape.in_w + cols.start) * pixel;
      char* y = job.y + (ptrdiff_t(row) * shape.out_w + col) * out_pixel;
      for (int block = 0; block < job.image_blocks; ++block, x += kVectorBytes, y += kVectorBytes) {
        if (columns == kColumns)
          depthwise_pixels<Math, A, kColumns>(job, rows, cols, x, shape.stride_w * pixel, y, out_pixel);
        else
          depthwise_pixels<Math, A, 1>(job, rows, cols, x, 0, y, 0);
      }
    }
  }
}

template <class Math>
void depthwise(const ConvJob& job) {
  with_curve(job.epilogue.activation,
             [&](auto which) { depthwise_with<Math, decltype(which)::value>(job); });
}

}  // namespace
}  // namespace correctnet
