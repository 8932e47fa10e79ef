// Packing of weights for the kernels. Weights become noisy while they are packed, a piece of a row at a time: the noise
// of a weight depends on its place in (out, kh, kw, in), never on tile, panel or piece. Internal linkage.
#pragma once

#include "cpu/lanes.h"
#include "noise/noise_fill.h"

namespace correctnet {
namespace {

constexpr int kPiece = 1024;  // positions of a row that are drawn at a time: those of six rows stay in L1

CN_INLINE int minimum(int a, int b) { return a < b ? a : b; }
CN_INLINE int maximum(int a, int b) { return a > b ? a : b; }

// The order of the packed weights of one output: position = ky * row + kx * tap + offset + c. Positions without a
// weight are zero.
struct Order {
  int kernel_w, channels;  // of the conv group of the output
  int row, tap, offset;

  CN_INLINE bool dense() const { return tap == channels && row == kernel_w * tap; }
  CN_INLINE int position(int element) const {
    const int taps = element / channels;
    return taps / kernel_w * row + taps % kernel_w * tap + offset + element % channels;
  }
  // The number of elements before a position, which must not be in the padding of a kernel row.
  CN_INLINE int elements_before(int position) const {
    const int in_row = position % row, taps = position / row * kernel_w + in_row / tap;
    return taps * channels + maximum(0, minimum(in_row % tap - offset, channels));
  }
};

// The order with no padding beyond the slot.
CN_INLINE Order order_of(const ConvShape& shape, const Panel& panel, int output, int slot_channels) {
  const int channels = shape.channels / shape.conv_groups, conv_group = output / (shape.outputs / shape.conv_groups);
  const int tap = panel.slots * slot_channels;
  return {shape.kernel_w, channels, shape.kernel_w * tap, tap, conv_group * channels - panel.slot * slot_channels};
}

CN_INLINE Nominal nominal_of(const PackJob& job) {
  const ConvShape& shape = *job.shape;
  const int64_t row = int64_t(shape.kernel_h) * shape.kernel_w * (shape.channels / shape.conv_groups);
  return {job.weight, job.spread, job.reach, row};
}

CN_INLINE void draw(const PackJob& job, int64_t first, int count, float* out) {
  if (job.noise)
    noise_fill(nominal_of(job), first, count, *job.noise, out);
  else
    memcpy(out, job.weight + first, count * sizeof(float));
}

CN_INLINE void draw(const PackJob& job, int64_t first, int count, uint16_t* out) {
  if (job.noise) {
    noise_fill(nominal_of(job), first, count, *job.noise, out);
  } else {
    for (int i = 0; i < count; ++i) out[i] = noise::bfloat16(job.weight[first + i]);
  }
}

// The weights of one output at positions begin .. end - 1, at most kPiece of them.
template <class T>
void draw_row(const PackJob& job, const Order& order, int output, int begin, int end, T* out) {
  const ConvShape& shape = *job.shape;
  const int64_t row = int64_t(output) * shape.kernel_h * shape.kernel_w * order.channels;
  if (order.dense()) return draw(job, row + begin, end - begin, out);
  T drawn[kPiece];
  const int first = order.elements_before(begin), last = order.elements_before(end);
  draw(job, row + first, last - first, drawn);
  memset(out, 0, (end - begin) * sizeof(T));
  for (int e = first, count; e < last; e += count) {
    count = minimum(order.channels - e % order.channels, last - e);
    memcpy(out + order.position(e) - begin, drawn + e - first, count * sizeof(T));
  }
}

template <class Math>
size_t packed_bytes(const ConvShape& shape, const Panel& panel) {
  const size_t bytes = size_t(shape.kernel_h) * shape.kernel_w * panel.slots * panel.width * Math::kWeightBytes;
  return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

// (slot, output) cells of Math::kCell channels each: see Float and Bfloat16 in lanes.h
template <class Math, int NC>
void pack_panel(const PackJob& job, const Panel& panel, char* packed) {
  typename Math::Drawn drawn[NC][kPiece];
  const int positions = job.shape->kernel_h * job.shape->kernel_w * panel.slots * Math::kChannels;
  for (int begin = 0; begin < positions; begin += kPiece) {
    const int end = minimum(begin + kPiece, positions);
    for (int c = 0; c < NC; ++c) {
      if (c < panel.outputs)
        draw_row(job, order_of(*job.shape, panel, panel.first + c, Math::kChannels), panel.first + c, begin, end,
                 drawn[c]);
      else
        memset(drawn[c], 0, sizeof drawn[c]);
    }
    for (int k = 0; k < end - begin; k += Math::kCell)
#pragma GCC unroll 6
      for (int c = 0; c < NC; ++c, packed += 4) {
        const uint32_t cell = Math::cell(drawn[c] + k);
        memcpy(packed, &cell, 4);
      }
  }
}

template <class Math>
void pack(const PackJob& job) {
  for (int i = 0; i < job.panel_count; ++i) {
    const Panel& panel = job.panels[i];
    char* packed = job.packed + (panel.offset - job.panels[0].offset);
    switch (panel.width) {
      case 2: pack_panel<Math, 2>(job, panel, packed); break;
      case 4: pack_panel<Math, 4>(job, panel, packed); break;
      case 6: pack_panel<Math, 6>(job, panel, packed); break;
    }
  }
}

}  // namespace
}  // namespace correctnet
