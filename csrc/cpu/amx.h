// Convolution with AMX. Weights in their natural order (output, position) are the A operand, and activations in their
// usual layout are the B operand: 16 slots x 16 images of one image block.
//
//   C tiles 0..3: outputs 0-15, 0-15, 16-31, 16-31 of a panel for image blocks 0, 1, 0, 1     A: 4, 5     B: 6, 7
//
// A panel has 32 outputs and is cut into slices of at most 512 positions (32 KB), each used for all pixels of a band of
// output rows while it stays in L1; partial sums are kept in a scratch buffer. Positions are padded to the 32 of a
// tile: the zero weights there multiply the slots that follow in the buffer, which belong to the same images.
#pragma once

#include "cpu/amx_tile.h"
#include "cpu/conv.h"
#include "cpu/pack.h"

namespace correctnet {
namespace {

constexpr int kAmxOutputs = 32, kTilePositions = 32, kTileSlots = 16, kSliceSteps = 16;
constexpr int kTileBytes = 1024, kBlockBytes = 2 * kTileBytes;  // of the sums: a tile, and the two tiles of a block
constexpr int kBandBytes = 256 << 10;

// A `unit` is a run of positions that is contiguous in both operands: a kernel row, or a single tap where rows may be
// cut short by the padding or are dilated.
struct AmxLayout {
  bool joined;
  int units, unit_steps;  // a step is 32 positions
  int slices, slice_steps;
  ptrdiff_t row_bytes, slice_bytes;

  AmxLayout(const ConvShape& s, const Panel& p) {
    joined = s.unpadded && s.dilation_w == 1 && p.slots == s.in_slots;
    units = s.kernel_h * (joined ? 1 : s.kernel_w);
    unit_steps = ((joined ? s.kernel_w : 1) * p.slots + kTileSlots - 1) / kTileSlots;
    slices = (units * unit_steps + kSliceSteps - 1) / kSliceSteps;
    slice_steps = (units * unit_steps + slices - 1) / slices;
    row_bytes = slice_steps * ptrdiff_t(kVectorBytes);
    slice_bytes = kAmxOutputs * row_bytes;
  }
};

size_t amx_packed_bytes(const ConvShape& shape, const Panel& panel) {
  const AmxLayout layout(shape, panel);
  return size_t(layout.slices) * layout.slice_bytes;
}

// (slice, 32 outputs, position)
void amx_pack(const PackJob& job) {
  for (int i = 0; i < job.panel_count; ++i) {
    const Panel& panel = job.panels[i];
    const AmxLayout layout(*job.shape, panel);
    char* packed = job.packed + (panel.offset - job.panels[0].offset);
    const int unit = layout.unit_steps * kTilePositions, slice = layout.slice_steps * kTilePositions;
    for (int c = 0; c < kAmxOutputs; ++c)
      for (int s = 0; s < layout.slices; ++s) {
        uint16_t* row = reinterpret_cast<uint16_t*>(packed + s * layout.slice_bytes + c * layout.row_bytes);
        if (c >= panel.outputs) {
          memset(row, 0, layout.row_bytes);
          continue;
        }
        Order order = order_of(*job.shape, panel, panel.first + c, 2);
        if (!layout.joined) order.tap = unit;
        order.row = layout.joined ? unit : order.kernel_w * unit;
        draw_row(job, order, panel.first + c, s * slice, minimum((s + 1) * slice, layout.units * unit), row);
      }
  }
}

// Bytes of the sums of one row of the convolution, or of the two rows of a pool; a band is as many as fit kBandBytes.
CN_INLINE int amx_row_bytes(const ConvShape& shape, int image_blocks) {
  return (shape.pool ? 2 : 1) * shape.out_w * image_blocks * kBlockBytes;
}

size_t amx_scratch_bytes(const ConvShape& shape, int image_blocks) {
  return maximum(kBandBytes, amx_row_bytes(shape, image_blocks));  // also enough for fewer image blocks
}

// One slice, one pixel: NA * 16 outputs, NB image blocks.
template <int NA, int NB>
CN_INLINE void amx_pixel(const ConvJob& job, const Panel& panel, const AmxLayout& layout, int slice, int row, int col,
                         int block, char* sums) {
  const ConvShape& shape = *job.shape;
  const ptrdiff_t slot = ptrdiff_t(job.image_blocks) * kVectorBytes;
  if (slice == 0) {
    tile_zero<0>();
    if (NB == 2) tile_zero<1>();
    if (NA == 2) tile_zero<2>();
    if (NA == 2 && NB == 2) tile_zero<3>();
  } else {
    tile_load<0>(sums, kVectorBytes);
    if (NB == 2) tile_load<1>(sums + kBlockBytes, kVectorBytes);
    if (NA == 2) tile_load<2>(sums + kTileBytes, kVectorBytes);
    if (NA == 2 && NB == 2) tile_load<3>(sums + kBlockBytes + kTileBytes, kVectorBytes);
  }
  const Taps rows = shape.rows[row], cols = shape.cols[col];
  const int begin = slice * layout.slice_steps;
  const int end = minimum(begin + layout.slice_steps, layout.units * layout.unit_steps);
  const char* weights = job.packed + (panel.offset - job.panels[0].offset) + slice * layout.slice_bytes;
  for (int step = begin; step < end;) {
    const int unit = step / layout.unit_steps, last = minimum(end, (unit + 1) * layout.unit_steps);
    const int ky = layout.joined ? unit : unit / shape.kernel_w;
    const int kx = layout.joined ? cols.first : unit % shape.kernel_w;
    if (ky < rows.first || ky >= rows.last || kx < cols.first || kx >= cols.last) {
      step = last;
      continue;
    }
    const int y = rows.start + (ky - rows.first) * shape.dilation_h;
    const int x = cols.start + (kx - cols.first) * shape.dilation_w;
    const char* pixel = job.x + ((ptrdiff_t(y) * shape.in_w + x) * shape.in_slots + panel.slot) * slot +
                        ptrdiff_t(block) * kVectorBytes;
    for (; step < last; ++step) {
      const char* b = pixel + (step - unit * layout.unit_steps) * kTileSlots * slot;
      const char* a = weights + (step - begin) * kVectorBytes;
      tile_load<6>(b, slot);
      tile_load<4>(a, layout.row_bytes);
      tile_dot<0, 4, 6>();
      if (NB == 2) {
        tile_load<7>(b + kVectorBytes, slot);
        tile_dot<1, 4, 7>();
      }
      if (NA == 2) {
        tile_load<5>(a + kLanes * layout.row_bytes, layout.row_bytes);
        tile_dot<2, 5, 6>();
        if (NB == 2) tile_dot<3, 5, 7>();
      }
    }
  }
  tile_store<0>(sums, kVectorBytes);
  if (NB == 2) tile_store<1>(sums + kBlockBytes, kVectorBytes);
  if (NA == 2) tile_store<2>(sums + kTileBytes, kVectorBytes);
  if (NA == 2 && NB == 2) tile_store<3>(sums + kBlockBytes + kTileBytes, kVectorBytes);
}

template <int NA>
void amx_band_sums(const ConvJob& job, const Panel& panel, int first, int last) {
  const ConvShape& shape = *job.shape;
  const AmxLayout layout(shape, panel);
  for (int slice = 0; slice < layout.slices; ++slice) {
    char* sums = job.scratch;
    for (int row = first; row < last; ++row)
      for (int col = 0; col < shape.out_w; ++col) {
        int block = 0;
        for (; block + 2 <= job.image_blocks; block += 2, sums += 2 * kBlockBytes)
          amx_pixel<NA, 2>(job, panel, layout, slice, row, col, block, sums);
        for (; block < job.image_blocks; ++block, sums += kBlockBytes)
          amx_pixel<NA, 1>(job, panel, layout, slice, row, col, block, sums);
      }
  }
}

// Applies the epilogue to rows first .. last - 1 of the convolution, whose sums are in the scratch buffer.
inline void amx_band_outputs(const ConvJob& job, const Panel& panel, int first, int last) {
  const ConvShape& shape = *job.shape;
  const int size = shape.pool ? 2 : 1, width = shape.out_w / size;
  const bool curves = job.epilogue.activation >= kFirstCurve;
  const ptrdiff_t pixel = ptrdiff_t(job.image_blocks) * kBlockBytes;
  const ptrdiff_t out_pixel = ptrdiff_t(job.out_slots) * job.image_blocks * kVectorBytes;
  for (int row = first / size; row < last / size; ++row)
    for (int col = 0; col < width; ++col)
      for (int block = 0; block < job.image_blocks; ++block)
        for (int c = 0; c < panel.outputs; c += 2) {
          Lanes best[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
          for (int i = 0; i < size * size; ++i) {
            const int y = row * size + i / size - first, x = col * size + i % size;
            const char* sums = job.scratch + (y * shape.out_w + x) * pixel + block * kBlockBytes + c * kVectorBytes;
            for (int j = 0; j < 2; ++j) {
              const Lanes sum = load(sums + j * kVectorBytes);
              const int channel = panel.first + c + j;
              best[j] = max(best[j], curves ? before(job.epilogue, channel, sum) : apply(job.epilogue, channel, sum));
            }
          }
          if (curves) {  // without a pool
            alignas(kVectorBytes) float kept[2][kLanes];
            for (int j = 0; j < 2; ++j) store(kept[j], best[j]);
            curve_all(job.epilogue.activation, kept[0], 2);
            for (int j = 0; j < 2; ++j) best[j] = after(job.epilogue, panel.first + c + j, load(kept[j]));
          }
          char* y = job.y + (ptrdiff_t(row) * width + col) * out_pixel + ptrdiff_t(block) * kVectorBytes;
          store_channels<Bfloat16, 2>(job, y, panel.first + c, panel.outputs - c, best);
        }
}

inline void amx_configure() {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = 16;
    config.row_bytes[t] = 64;
  }
  tile_configure(config);
}

void amx_conv(const ConvJob& job) {
  const ConvShape& shape = *job.shape;
  amx_configure();
  const int band = (shape.pool ? 2 : 1) * maximum(1, kBandBytes / amx_row_bytes(shape, job.image_blocks));
  for (int first = 0; first < shape.out_h; first += band)
    for (int i = 0; i < job.panel_count; ++i) {
      const Panel& panel = job.panels[i];
      const int last = minimum(first + band, shape.out_h);
      if (panel.outputs > 16)
        amx_band_sums<2>(job, panel, first, last);
      else
        amx_band_sums<1>(job, panel, first, last);
      amx_band_outputs(job, panel, first, last);
    }
  tile_release();
}

// As in peak.h: the four tile products of a step, with operands already in tiles.
double amx_peak(int64_t repetitions) {
  alignas(kVectorBytes) uint16_t ones[kTileBytes / 2];
  for (uint16_t& one : ones) one = noise::bfloat16(1);
  amx_configure();
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  tile_load<4>(ones, kVectorBytes);
  tile_load<5>(ones, kVectorBytes);
  tile_load<6>(ones, kVectorBytes);
  tile_load<7>(ones, kVectorBytes);
  for (int64_t r = 0; r < repetitions; ++r) {
    tile_dot<0, 4, 6>();
    tile_dot<1, 4, 7>();
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_release();
  return 2.0 * 4 * 16 * kLanes * kTilePositions * double(repetitions);
}

}  // namespace
}  // namespace correctnet
