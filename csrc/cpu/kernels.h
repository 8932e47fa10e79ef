// Interface between plans and CPU kernels: plain data, and one table of functions for each instruction set.
//
// Images in lanes. An activation tensor (channels, height, width) of 16 * image_blocks images is stored as
//
//     float32:  X[h][w][c][block][16 images]                   bfloat16:  X[h][w][c / 2][block][16 images][2]
//
// so that the unit of both is a `slot`, a 64-byte vector with one channel (float32) or two (bfloat16) of 16 images. A
// weight is a scalar that multiplies a whole vector: channel counts need no padding beyond pairs, a convolution needs
// no im2col, and a tap that falls on the padding is skipped instead of multiplied by zero. For AMX the same buffer is
// the B operand in VNNI form. An odd last channel has a zero partner; lanes without an image hold results of zero
// inputs.
//
// The files that implement a table are compiled with different flags, so this header defines no functions with external
// linkage: the linker would keep one copy, possibly one that this machine cannot execute.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "noise/noise.h"

namespace correctnet {

enum { kLanes = 16, kVectorBytes = 64, kPanelOutputs = 6, kAttentionQueries = 32 };

enum class Type { float32, bfloat16 };

// The taps of a kernel row (or column) that fall inside the input for one output position: first <= tap < last, and
// `start`, the input position of tap `first`.
struct Taps {
  int first, last, start;
};

// A convolution without its tensors. A linear layer is one with a 1 x 1 kernel on a 1 x 1 image.
struct ConvShape {
  int outputs, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int channels, conv_groups;  // of the whole input; groups of channels that are convolved separately
  int in_w, in_slots;       // width and slots of the input
  int out_h, out_w;         // of the convolution, before pooling
  const Taps *rows, *cols;  // out_h and out_w of them
  bool unpadded;            // every column of the output sees every tap of a kernel row
  bool pool;                // a 2 x 2 max-pool with stride 2 follows; an odd last row or column is dropped
  bool depthwise;           // every group has one channel and one output; there is one panel, and no pool
};

// The outputs computed by one register tile, and the input slots that they need (all of them unless conv_groups > 1).
struct Panel {
  int first, outputs;  // outputs first .. first + outputs - 1
  int width;           // columns of the tile, >= outputs: 2, 4 or 6 (AMX: 32)
  int slot, slots;
  size_t offset;  // of its packed weights, in bytes
};

// As in torch. clamp: min(max(x, low), high); leaky: x, or low * x where x is negative; gelu_tanh: the approximation of
// GELU by tanh. The functions from `kFirstCurve` on are in activations.h.
enum class Activation { none, relu, clamp, leaky, sigmoid, tanh, silu, gelu, gelu_tanh, hardsigmoid, hardswish };

constexpr Activation kFirstCurve = Activation::sigmoid;

// k = round(clamp(a * inverse, -steps, steps)), halves to even; not there where `inverse` is 0.
struct Converter {
  float inverse = 0, steps = 0;
};

// y = dac(after_scale * activation(scale * adc(x) + shift) + after_shift) for every channel; `after` and the converters
// are optional. Where the number of channels is odd, arrays end with an additional zero.
struct Epilogue {
  const float *scale, *shift;
  const float *after_scale, *after_shift;  // null: none
  Activation activation;
  float low, high;
  bool monotone;  // everything is finite and every scale positive: a max-pool before it gives the same as after it
  Converter adc, dac;
};

struct ConvJob {
  const ConvShape* shape;
  const char* x;
  char* y;
  int image_blocks;  // of 16 images each
  int out_slots;   // slots a pixel of y
  bool float_out;  // y is float32, whatever x is
  const Panel* panels;
  int panel_count;
  const char* packed;  // weights of the panels; those of panels[i] begin at panels[i].offset - panels[0].offset
  Epilogue epilogue;
  char* scratch;  // of TypeKernels::scratch_bytes
};

struct PackJob {
  const ConvShape* shape;
  const float* weight;  // (outputs, kernel_h, kernel_w, channels / conv_groups)
  const Noise* noise;   // null: the nominal weights
  const Panel* panels;
  int panel_count;
  char* packed;  // as in ConvJob
  const float* spread = nullptr;  // of each weight and of each output, where the noise's kind reads them (`Nominal`)
  const float* reach = nullptr;
};

// Max- or average-pool: y[i][j] is taken over rows[i].first <= h < rows[i].last and the columns likewise.
struct PoolJob {
  const char* x;
  char* y;
  int image_blocks, slots, in_w, out_h, out_w;
  const Taps *rows, *cols;
  bool average;
  int divisor;  // of an average; 0: the size of the window
};

// y = epilogue(a + b) or epilogue(a * b), or epilogue(a) where b is null.
struct PointwiseJob {
  const char *a, *b;
  char* y;
  int image_blocks, channels, slots, pixels;
  bool multiply;
  bool one_pixel;  // b has one pixel, which meets all of a
  Epilogue epilogue;
};

// y = epilogue((x - mean) / sqrt(variance + eps)), mean and variance over the channels of each pixel, or, with groups,
// over all pixels and the channels of each group; without a curve.
struct NormalizeJob {
  const char* x;
  char* y;
  int image_blocks, channels, slots, pixels, groups;
  float eps;
  Epilogue epilogue;
};

// y[c * pixels + p] = x[p][c], pixels counting over (h, w)
struct FlattenJob {
  const char* x;
  char* y;
  int image_blocks, channels, pixels;
};

// `count` channels of one source pixel, from `channel` on; a null pixel stands for zeros.
struct ChannelRun {
  const char* pixel;
  int channel, count;
};

// One pixel of y, assembled from runs of channels.
struct AssembleJob {
  char* y;
  const ChannelRun* runs;
  int run_count, image_blocks;
};

// Attention of several heads within each group of tokens, see attention.h. The heads' channels follow one another, in q,
// k and v from the first one named; their numbers are even.
struct AttentionJob {
  const char *q, *k, *v;
  char* y;
  int image_blocks;
  int q_slots, k_slots, v_slots, out_slots;  // a pixel
  int q_first, k_first, v_first;             // the first channel of the first head
  int heads, width;                          // and channels of a head
  const int* tokens;                         // (groups, length): their pixels
  int groups, length;
  float scale;
  const float* bias;  // (heads, length, length), added to the scores; null: none
  const float* mask;  // (groups, length, length), added too
  char* scratch;      // 4 * kLanes * ((2 * length + kPanelOutputs + kAttentionQueries) * width + kAttentionQueries * length) bytes
};

struct TypeKernels {
  size_t (*packed_bytes)(const ConvShape&, const Panel&);  // of one panel, a multiple of kVectorBytes
  size_t (*scratch_bytes)(const ConvShape&, int image_blocks);
  void (*pack)(const PackJob&);
  void (*conv)(const ConvJob&);
  void (*pool)(const PoolJob&);
  void (*pointwise)(const PointwiseJob&);
  void (*normalize)(const NormalizeJob&);
  void (*flatten)(const FlattenJob&);
  void (*assemble)(const AssembleJob&);
  void (*attention)(const AttentionJob&);
  int panel_width;  // the widest panel: kPanelOutputs, or 32 for AMX
  // Executes multiply-adds in registers and returns the number of floating-point operations, see peak.h.
  double (*peak)(int64_t repetitions);
};

struct Kernels {
  const char* name;
  TypeKernels type[2];  // by Type
};

extern const Kernels kernels_portable, kernels_amx_model;
#if defined(CORRECTNET_X86)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;
#endif

const Kernels& kernels(Isa isa);

}  // namespace correctnet
