// Convolution, pooling and the memory-bound operations, based on the register tile of lanes.h. Internal linkage.
#pragma once

#include "cpu/activations.h"
#include "cpu/lanes.h"

namespace correctnet {
namespace {

CN_INLINE Lanes converted(const Converter& c, Lanes a) {
  const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  a = clamp(mul(a, splat(c.inverse)), splat(-c.steps), splat(c.steps));
  return sub(add(a, magic), magic);
}

// The three parts of an epilogue; in `apply` there is no curve between the first and the last.
CN_INLINE Lanes before(const Epilogue& e, int channel, Lanes a) {
  if (e.adc.inverse != 0) a = converted(e.adc, a);
  return fma(a, splat(e.scale[channel]), splat(e.shift[channel]));
}

CN_INLINE Lanes piecewise(const Epilogue& e, Lanes a) {
  if (e.activation == Activation::relu) a = relu(a);
  if (e.activation == Activation::clamp) a = clamp(a, splat(e.low), splat(e.high));
  if (e.activation == Activation::leaky)  // exact: one of the two is zero
    a = fma(clamp(a, splat(-__builtin_inff()), zero()), splat(e.low), relu(a));
  return a;
}

CN_INLINE Lanes after(const Epilogue& e, int channel, Lanes a) {
  if (e.after_scale) a = fma(a, splat(e.after_scale[channel]), splat(e.after_shift[channel]));
  if (e.dac.inverse != 0) a = converted(e.dac, a);
  return a;
}

CN_INLINE Lanes apply(const Epilogue& e, int channel, Lanes a) {
  return after(e, channel, piecewise(e, before(e, channel, a)));
}

// Writes channels first .. first + count - 1 (at most NC, `first` even) of one image vector. y: its vector in slot 0.
// The partner of an odd last channel is set to zero: its sum of zero products is NaN where an input is infinite.
template <class Math, int NC>
CN_INLINE void store_channels(const ConvJob& job, char* y, int first, int count, const Lanes (&a)[NC]) {
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes;
  if (Math::kChannels == 1 || job.float_out) {
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c)
      if (c < count) store(y + (first + c) * slot, a[c]);
  } else {
#pragma GCC unroll 3
    for (int c = 0; c < NC; c += 2)
      if (c < count) store_pair(y + (first + c) / 2 * slot, a[c], c + 1 < count ? a[c + 1] : zero());
  }
}

template <class Math, int NC>
struct PanelConv {
  const ConvJob& job;
  const ConvShape& shape;
  const Panel& panel;
  const char* weights;

  ptrdiff_t slot() const { return ptrdiff_t(job.image_blocks) * kVectorBytes; }
  ptrdiff_t pixel() const { return shape.in_slots * slot(); }
  char* out(int row, int col, int width) const {
    return job.y + (ptrdiff_t(row) * width + col) * job.out_slots * slot();
  }

  // sum[v][c] = sum of x * w over the taps inside the input and over the slots. Image vector v is at job.x + at[v].
  template <int NV>
  CN_INLINE void accumulate(Lanes (&sum)[NV][NC], Taps row, Taps col, const ptrdiff_t (&at)[NV]) const {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) sum[v][c] = zero();
    const ptrdiff_t step = slot(), tap_weights = ptrdiff_t(panel.slots) * NC * Math::kWeightBytes;
    // Where neighbouring taps are adjacent in memory, one run covers the whole kernel row.
    const bool joined = shape.dilation_w == 1 && panel.slots == shape.in_slots;
    const int runs = joined ? 1 : col.last - col.first;
    const int length = joined ? (col.last - col.first) * panel.slots : panel.slots;
    for (int ky = row.first; ky < row.last; ++ky) {
      const char* x = job.x + panel.slot * step +
                      (ptrdiff_t(row.start + (ky - row.first) * shape.dilation_h) * shape.in_w + col.start) * pixel();
      const char* w = weights + (ky * shape.kernel_w + col.first) * tap_weights;
      for (int run = 0; run < runs; ++run, x += shape.dilation_w * pixel()) {
        const char* p = x;
        for (int k = 0; k < length; ++k, p += step, w += NC * Math::kWeightBytes) Math::step(sum, p, at, w);
      }
    }
  }

  // NV image vectors, `in` apart in x and `out_step` apart in y: NV image blocks at one pixel, or one block at
  // neighbouring pixels that see the same taps.
  template <int NV>
  CN_INLINE void plain(int row, int col, int block, ptrdiff_t in, ptrdiff_t out_step) const {
    Lanes sum[NV][NC];
    ptrdiff_t at[NV];
    for (int v = 0; v < NV; ++v) at[v] = block * kVectorBytes + v * in;
    accumulate<NV>(sum, shape.rows[row], shape.cols[col], at);
    char* y = out(row, col, shape.out_w) + block * kVectorBytes;
    if (job.epilogue.activation >= kFirstCurve) return curved<NV>(sum, y, out_step);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) sum[v][c] = apply(job.epilogue, panel.first + c, sum[v][c]);
      store_channels<Math, NC>(job, y + v * out_step, panel.first, panel.outputs, sum[v]);
    }
  }

  // The epilogue with a curve, and the stores of `plain`.
  template <int NV>
  CN_INLINE void curved(const Lanes (&sum)[NV][NC], char* y, ptrdiff_t out_step) const {
    alignas(kVectorBytes) float kept[NV][NC][kLanes];  // not `sum`, which has to stay in registers
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) store(kept[v][c], before(job.epilogue, panel.first + c, sum[v][c]));
    curve_all(job.epilogue.activation, kept[0][0], NV * NC);
    for (int v = 0; v < NV; ++v) {
      Lanes a[NC];
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) a[c] = after(job.epilogue, panel.first + c, load(kept[v][c]));
      store_channels<Math, NC>(job, y + v * out_step, panel.first, panel.outputs, a);
    }
  }

  // The same for the four pixels of a pool window, one after the other.
  template <int NV>
  CN_INLINE void pooled(int row, int col, int block) const {
    alignas(kVectorBytes) float best[NV][NC][kLanes];
    ptrdiff_t at[NV];
    for (int v = 0; v < NV; ++v) {
      at[v] = (block + v) * kVectorBytes;
      for (int c = 0; c < NC; ++c) store(best[v][c], splat(-__builtin_inff()));
    }
    for (int i = 0; i < 4; ++i) {
      Lanes sum[NV][NC];
      accumulate<NV>(sum, shape.rows[2 * row + i / 2], shape.cols[2 * col + i % 2], at);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
#pragma GCC unroll 6
        for (int c = 0; c < NC; ++c)
          store(best[v][c], max(load(best[v][c]), apply(job.epilogue, panel.first + c, sum[v][c])));
    }
    char* y = out(row, col, shape.out_w / 2);
    for (int v = 0; v < NV; ++v) {
      Lanes a[NC];
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) a[c] = load(best[v][c]);
      store_channels<Math, NC>(job, y + at[v], panel.first, panel.outputs, a);
    }
  }

  // The same with the four pixels as the four vectors of the tile, for one block; all of them see every tap.
  CN_INLINE void quad(int row, int col, int block) const {
    const ptrdiff_t right = shape.stride_w * pixel(), down = ptrdiff_t(shape.stride_h) * shape.in_w * pixel();
    const ptrdiff_t image = ptrdiff_t(block) * kVectorBytes;
    const ptrdiff_t at[4] = {image, image + right, image + down, image + down + right};
    Lanes sum[4][NC], a[NC];
    accumulate<4>(sum, shape.rows[2 * row], shape.cols[2 * col], at);
#pragma GCC unroll 6
    for (int c = 0; c < NC; ++c) {
      if (!job.epilogue.monotone)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v][c] = apply(job.epilogue, panel.first + c, sum[v][c]);
      a[c] = max(max(sum[0][c], sum[1][c]), max(sum[2][c], sum[3][c]));
      if (job.epilogue.monotone) a[c] = apply(job.epilogue, panel.first + c, a[c]);
    }
    store_channels<Math, NC>(job, out(row, col, shape.out_w / 2) + image, panel.first, panel.outputs, a);
  }

  static CN_INLINE bool whole(const Taps* pair, int kernel) {
    return pair[0].last - pair[0].first == kernel && pair[1].last - pair[1].first == kernel;
  }

  // Two neighbouring pool windows of one block, the four pixels of each of their rows being a tile.
  CN_INLINE void two_windows(int row, int col, int block) const {
    ptrdiff_t at[4];
    for (int v = 0; v < 4; ++v) at[v] = block * kVectorBytes + v * shape.stride_w * pixel();
    alignas(kVectorBytes) float best[2][NC][kLanes];
    for (int i = 0; i < 2; ++i) {
      Lanes sum[4][NC];
      accumulate<4>(sum, shape.rows[2 * row + i], shape.cols[2 * col], at);
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w)
#pragma GCC unroll 6
        for (int c = 0; c < NC; ++c) {
          const Lanes a = max(apply(job.epilogue, panel.first + c, sum[2 * w][c]),
                              apply(job.epilogue, panel.first + c, sum[2 * w + 1][c]));
          store(best[w][c], i ? max(load(best[w][c]), a) : a);
        }
    }
    for (int w = 0; w < 2; ++w) {
      Lanes a[NC];
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c) a[c] = load(best[w][c]);
      store_channels<Math, NC>(job, out(row, col + w, shape.out_w / 2) + block * kVectorBytes, panel.first,
                               panel.outputs, a);
    }
  }

  // Whether `count` columns from `col` on see the same taps.
  CN_INLINE bool alike(int col, int count) const {
    if (col + count > shape.out_w) return false;
    for (int i = 1; i < count; ++i)
      if (shape.cols[col + i].first != shape.cols[col].first || shape.cols[col + i].last != shape.cols[col].last)
        return false;
    return true;
  }

  template <int NV>
  CN_INLINE void vectors(int row, int col, int block) const {
    if (shape.pool)
      pooled<NV>(row, col, block);
    else
      plain<NV>(row, col, block, kVectorBytes, kVectorBytes);
  }

  // Computes as many columns from `col` on as one tile covers, and returns their number.
  CN_INLINE int output_tile(int row, int col) const {
    int block = 0, columns = 1;
    if constexpr (kMaxVectors == 4) {
      const ptrdiff_t right = shape.stride_w * pixel(), out_right = job.out_slots * slot();
      if (shape.pool) {
        if (whole(shape.rows + 2 * row, shape.kernel_h) && whole(shape.cols + 2 * col, shape.kernel_w)) {
          for (; block < job.image_blocks; ++block) quad(row, col, block);
        } else if (job.image_blocks < 4 && 2 * col + 4 <= shape.out_w && alike(2 * col, 4)) {
          for (columns = 2; block < job.image_blocks; ++block) two_windows(row, col, block);
        }
      } else if (job.image_blocks < 4 && alike(col, 4)) {
        for (columns = 4; block < job.image_blocks; ++block) plain<4>(row, col, block, right, out_right);
      } else if (job.image_blocks < 2 && alike(col, 2)) {
        for (columns = 2; block < job.image_blocks; ++block) plain<2>(row, col, block, right, out_right);
      }
      for (; block + 4 <= job.image_blocks; block += 4) vectors<4>(row, col, block);
      for (; block + 2 <= job.image_blocks; block += 2) vectors<2>(row, col, block);
    }
    for (; block < job.image_blocks; ++block) vectors<1>(row, col, block);
    return columns;
  }

  // Computes columns `col` to `end`, or a few more where the last tile covers more, and returns the next column.
  __attribute__((noinline)) int output_columns(int row, int col, int end) const {
    while (col < end) col += output_tile(row, col);
    return col;
  }
};

// Share of a second-level cache: the part of x that all panels read, one after the other.
constexpr ptrdiff_t kReadBytes = 128 << 10;

// Parts of a row are the outer loop, panels the inner: what a part reads of x stays in the cache for all panels.
template <class Math>
void conv(const ConvJob& job) {
  const ConvShape& shape = *job.shape;
  const int pooled = shape.pool ? 2 : 1, rows = shape.out_h / pooled, width = shape.out_w / pooled;
  const ptrdiff_t column =
      ptrdiff_t(shape.kernel_h) * shape.stride_w * pooled * shape.in_slots * job.image_blocks * kVectorBytes;
  const int part = column * 8 > kReadBytes ? 8 : int(kReadBytes / column);
  for (int row = 0; row < rows; ++row)
    for (int col = 0, next = 0; col < width; col = next) {
      const int end = col + part < width ? col + part : width;
      next = end;
      for (int i = 0; i < job.panel_count; ++i) {
        const Panel& panel = job.panels[i];
        const char* weights = job.packed + (panel.offset - job.panels[0].offset);
        switch (panel.width) {
          case 2: next = PanelConv<Math, 2>{job, shape, panel, weights}.output_columns(row, col, end); break;
          case 4: next = PanelConv<Math, 4>{job, shape, panel, weights}.output_columns(row, col, end); break;
          default: next = PanelConv<Math, 6>{job, shape, panel, weights}.output_columns(row, col, end); break;
        }
      }
    }
}

// ---- memory-bound operations ----------------------------------------------------------------------------------------

alignas(kVectorBytes) const char kZeros[kVectorBytes] = {};

// A slot as one vector (float32) or two (bfloat16: the even and the odd channels).
template <class Math>
struct Slot {
  Lanes a[Math::kChannels];
};

template <class Math>
CN_INLINE Slot<Math> load_slot(const char* p) {
  if constexpr (Math::kChannels == 1)
    return {{load(p)}};
  else
    return {{load_even(p), load_odd(p)}};
}

template <class Math>
CN_INLINE void store_slot(char* p, const Slot<Math>& s) {
  if constexpr (Math::kChannels == 1)
    store(p, s.a[0]);
  else
    store_pair(p, s.a[0], s.a[1]);
}

template <class Math>
void pool(const PoolJob& job) {
  const int vectors = job.slots * job.image_blocks;
  const ptrdiff_t pixel = ptrdiff_t(vectors) * kVectorBytes;
  for (int i = 0; i < job.out_h; ++i)
    for (int j = 0; j < job.out_w; ++j) {
      const Taps row = job.rows[i], col = job.cols[j];
      const Lanes size = splat(float(job.divisor ? job.divisor : (row.last - row.first) * (col.last - col.first)));
      const char* x = job.x + (ptrdiff_t(row.start) * job.in_w + col.start) * pixel;
      char* y = job.y + (ptrdiff_t(i) * job.out_w + j) * pixel;
      for (int v = 0; v < vectors; ++v) {
        Slot<Math> sum = load_slot<Math>(x + ptrdiff_t(v) * kVectorBytes);
        for (int h = 0; h < row.last - row.first; ++h)
          for (int w = h == 0; w < col.last - col.first; ++w) {
            const Slot<Math> s =
                load_slot<Math>(x + (ptrdiff_t(h) * job.in_w + w) * pixel + ptrdiff_t(v) * kVectorBytes);
            for (int c = 0; c < Math::kChannels; ++c)
              sum.a[c] = job.average ? add(sum.a[c], s.a[c]) : max(sum.a[c], s.a[c]);
          }
        if (job.average)
          for (int c = 0; c < Math::kChannels; ++c) sum.a[c] = div(sum.a[c], size);
        store_slot<Math>(y + ptrdiff_t(v) * kVectorBytes, sum);
      }
    }
}

// The zero partner of an odd last channel is zero whatever the activation makes of it.
template <class Math, Activation A>
void pointwise_with(const PointwiseJob& job) {
  const ptrdiff_t pixel = ptrdiff_t(job.slots) * job.image_blocks * kVectorBytes;
  for (int p = 0; p < job.pixels; ++p) {
    const char* a = job.a + p * pixel;
    const char* b = job.b ? job.b + (job.one_pixel ? 0 : p * pixel) : nullptr;
    char* y = job.y + p * pixel;
    ptrdiff_t offset = 0;
    for (int slot = 0; slot < job.slots; ++slot)
      for (int block = 0; block < job.image_blocks; ++block, offset += kVectorBytes) {
        Slot<Math> s = load_slot<Math>(a + offset);
        if (b) {
          const Slot<Math> t = load_slot<Math>(b + offset);
          for (int c = 0; c < Math::kChannels; ++c) s.a[c] = job.multiply ? mul(s.a[c], t.a[c]) : add(s.a[c], t.a[c]);
        }
        for (int c = 0; c < Math::kChannels; ++c) {
          const int channel = slot * Math::kChannels + c;
          s.a[c] = before(job.epilogue, channel, s.a[c]);
          s.a[c] = A == Activation::none ? piecewise(job.epilogue, s.a[c]) : curve<A>(s.a[c]);
          s.a[c] = after(job.epilogue, channel, s.a[c]);
          if (c > 0 && channel >= job.channels) s.a[c] = zero();
        }
        store_slot<Math>(y + offset, s);
      }
  }
}

template <class Math>
void pointwise(const PointwiseJob& job) {
  with_curve(job.epilogue.activation,
             [&](auto which) { pointwise_with<Math, decltype(which)::value>(job); });
}

// One image block and group. A slot whose channels are in two groups is written by each.
template <class Math>
void normalize_group(const NormalizeJob& job, int block, int group) {
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes, pixel = job.slots * slot;
  const int count = job.channels / job.groups, first = group * count;
  const auto channel = [&](int p, int c) {
    const Slot<Math> s = load_slot<Math>(job.x + p * pixel + c / Math::kChannels * slot + block * kVectorBytes);
    return Math::kChannels == 2 && c % 2 ? s.a[Math::kChannels - 1] : s.a[0];
  };
  const Lanes each = splat(1.0f / (float(count) * float(job.pixels)));
  Lanes mean = zero(), variance = zero();
  for (int p = 0; p < job.pixels; ++p) {
    Lanes sum = zero();
    for (int c = first; c < first + count; ++c) sum = add(sum, channel(p, c));
    mean = fma(sum, each, mean);
  }
  for (int p = 0; p < job.pixels; ++p) {
    Lanes sum = zero();
    for (int c = first; c < first + count; ++c) {
      const Lanes deviation = sub(channel(p, c), mean);
      sum = fma(deviation, deviation, sum);
    }
    variance = fma(sum, each, variance);
  }
  const Lanes scale = div(splat(1), sqrt(add(variance, splat(job.eps))));
  for (int p = 0; p < job.pixels; ++p)
    for (int c = first; c < first + count; ++c) {
      char* y = job.y + p * pixel + c / Math::kChannels * slot + block * kVectorBytes;
      Slot<Math> s;
      if (Math::kChannels == 2) s = load_slot<Math>(c % 2 ? y : kZeros);
      s.a[Math::kChannels == 2 && c % 2 ? Math::kChannels - 1 : 0] =
          apply(job.epilogue, c, mul(sub(channel(p, c), mean), scale));
      store_slot<Math>(y, s);
    }
}

template <class Math>
void normalize(const NormalizeJob& job) {
  for (int block = 0; job.groups && block < job.image_blocks; ++block)
    for (int group = 0; group < job.groups; ++group) normalize_group<Math>(job, block, group);
  if (job.groups) return;
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes, pixel = job.slots * slot;
  const Lanes each = splat(1.0f / float(job.channels));
  for (int p = 0; p < job.pixels; ++p)
    for (int block = 0; block < job.image_blocks; ++block) {
      const ptrdiff_t first = p * pixel + block * kVectorBytes;
      Lanes mean = zero(), variance = zero();
      for (int s = 0; s < job.slots; ++s) {  // an odd last channel has a zero partner
        const Slot<Math> a = load_slot<Math>(job.x + first + s * slot);
        for (int c = 0; c < Math::kChannels; ++c) mean = add(mean, a.a[c]);
      }
      mean = mul(mean, each);
      for (int s = 0; s < job.slots; ++s) {
        const Slot<Math> a = load_slot<Math>(job.x + first + s * slot);
        for (int c = 0; c < Math::kChannels; ++c) {
          const Lanes deviation = sub(a.a[c], mean);
          if (s * Math::kChannels + c < job.channels) variance = fma(deviation, deviation, variance);
        }
      }
      const Lanes scale = div(splat(1), sqrt(fma(variance, each, splat(job.eps))));
      for (int s = 0; s < job.slots; ++s) {
        Slot<Math> a = load_slot<Math>(job.x + first + s * slot);
        for (int c = 0; c < Math::kChannels; ++c) {
          const int channel = s * Math::kChannels + c;
          a.a[c] = apply(job.epilogue, channel, mul(sub(a.a[c], mean), scale));
          if (c > 0 && channel >= job.channels) a.a[c] = zero();
        }
        store_slot<Math>(job.y + first + s * slot, a);
      }
    }
}

// Where a channel of a bfloat16 pixel is: a slot, and half of its 4-byte lanes.
struct Half {
  const char* slot;
  int shift;
  ptrdiff_t step;  // to the next block
};

CN_INLINE Half half_of(const char* pixel, int channel, ptrdiff_t slot_bytes) {
  if (!pixel) return {kZeros, 0, 0};
  return {pixel + channel / 2 * slot_bytes, channel % 2 * 16, kVectorBytes};
}

CN_INLINE void store_halves(char* y, Half even, Half odd, int image_blocks) {
  for (int g = 0; g < image_blocks; ++g, y += kVectorBytes, even.slot += even.step, odd.slot += odd.step) {
    uint32_t a[kLanes], b[kLanes];
    memcpy(a, even.slot, sizeof a);
    memcpy(b, odd.slot, sizeof b);
    for (int i = 0; i < kLanes; ++i) a[i] = (a[i] >> even.shift & 0xffff) | b[i] >> odd.shift << 16;
    memcpy(y, a, sizeof a);
  }
}

// (h, w, c) -> (c, h, w)
template <class Math>
void flatten(const FlattenJob& job) {
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes;
  const ptrdiff_t pixel = (job.channels + Math::kChannels - 1) / Math::kChannels * slot;
  char* y = job.y;
  Half even = {};
  int n = 0;
  for (int c = 0; c < job.channels; ++c)
    for (int i = 0; i < job.pixels; ++i, ++n) {
      if (Math::kChannels == 1) {
        memcpy(y, job.x + i * pixel + c * slot, slot);
        y += slot;
        continue;
      }
      const Half half = half_of(job.x + i * pixel, c, slot);
      if (n % 2) {
        store_halves(y, even, half, job.image_blocks);
        y += slot;
      } else {
        even = half;
      }
    }
  if (Math::kChannels == 2 && n % 2) store_halves(y, even, half_of(nullptr, 0, slot), job.image_blocks);
}

template <class Math>
void assemble(const AssembleJob& job) {
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes;
  const Half zeros = half_of(nullptr, 0, slot);
  Half even = zeros;  // of a slot that waits for its odd channel
  int channel = 0;
  for (int i = 0; i < job.run_count; ++i) {
    const ChannelRun& run = job.runs[i];
    int done = 0;
    if (run.pixel && (channel | run.channel) % Math::kChannels == 0) {
      const int whole = run.count / Math::kChannels;
      memcpy(job.y + channel / Math::kChannels * slot, run.pixel + run.channel / Math::kChannels * slot, whole * slot);
      done = whole * Math::kChannels;
    } else if (Math::kChannels == 1) {
      memset(job.y + channel * slot, 0, run.count * slot);
      done = run.count;
    }
    for (; done < run.count; ++done) {
      const Half half = half_of(run.pixel, run.channel + done, slot);
      if ((channel + done) % 2)
        store_halves(job.y + (channel + done) / 2 * slot, even, half, job.image_blocks);
      else
        even = half;
    }
    channel += run.count;
  }
  if (Math::kChannels == 2 && channel % 2) store_halves(job.y + channel / 2 * slot, even, zeros, job.image_blocks);
}

}  // namespace
}  // namespace correctnet
