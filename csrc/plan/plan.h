// A network to be run on many chip samples: a flat list of operations over numbered values.
//
//   Plan plan(Type::bfloat16, kernels(selected_isa()), {1, 32, 32});
//   int x = plan.conv(plan.input(), ...);                  every operation returns the number of its value
//   plan.finish(plan.linear(x, ...));
//   plan.run(...);
//
// An operation is *sampled* if it carries noise or follows one that does. All others are the same on every chip and run
// once, before the first chip. Each thread then processes one chip sample after the other: it packs the noisy weights
// of a layer when they are first needed, and runs the images in chunks; where feature maps are wide, one block of 16
// images of the chunk after the other. Packed weights of a chip are kept from chunk to chunk up to a limit of memory
// and drawn again for each chunk beyond it.
//
// In bfloat16, weights and activations are rounded to it; sums and the output of the last layer are float32.
//
// NaN and infinity propagate as in torch and never reach another image or chip, with two differences: taps on padding
// are skipped, so that zero padding times infinity gives no NaN; and the zero weights that fill a panel (with several
// conv groups, or for AMX) multiply unrelated channels and pixels of the same image, so that an infinity there turns
// more outputs of that image into NaN.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace correctnet {

// Throws std::invalid_argument.
[[noreturn]] void fail(const std::string& message);

struct Shape {
  int channels, height, width;
};

// y = dac(after_scale * activation(scale * adc(x) + shift) + after_shift) for every channel. An empty vector means all
// ones (scales) or zeros (shifts). Covers a bias, and BatchNorm before or after the activation. `low` and `high` are the
// bounds of a clamp, `low` is the slope of a leaky ReLU. `adc` converts the outputs of a crossbar, and `dac` the inputs
// of the next one, both to whole numbers.
struct Pointwise {
  std::vector<float> scale, shift;
  Activation activation = Activation::none;
  std::vector<float> after_scale, after_shift;
  float low = 0, high = 0;
  Converter adc = {}, dac = {};
};

const char* name(Activation activation);

struct Conv {
  int outputs = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;  // conv groups, as in torch
  std::vector<float> weight;  // (outputs, kernel_h, kernel_w, channels / groups)
  std::optional<Noise> noise;  // of the layer; `Run` says which seed and samples
  Pointwise pointwise;
  bool pool = false;  // a 2 x 2 max-pool with stride 2 follows; not with an activation of activations.h
  std::vector<float> spread = {}, reach = {};  // as `weight`, and (outputs): what noise that is no factor reads
};

struct Linear {
  int outputs = 0;
  std::vector<float> weight;  // (outputs, inputs)
  std::optional<Noise> noise;  // of the layer; `Run` says which seed and samples
  Pointwise pointwise;
  std::vector<float> spread = {}, reach = {};  // as in Conv
};

// The moving window of a pool. With `ceil` a last window may reach beyond the padding, though it begins before it.
// Averages count padding as zeros, or, without `include_padding`, the input alone.
struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h = 0, padding_w = 0;
  bool ceil = false, include_padding = true;
};

// Attention of several heads within each group of pixels, the tokens: y_i = sum_j softmax_j(scale * q_i . k_j + bias_ij +
// mask_ij) v_j. The heads' channels follow one another, in q, k and v from the `first` one on.
struct Attention {
  int heads = 1, width = 1;    // channels a head, an even number
  int first[3] = {0, 0, 0};    // of q, k, v, even numbers
  float scale = 1;
  std::vector<int> tokens;     // (groups, length): every pixel once, as its place in the order (h, w)
  int length = 0;
  std::vector<float> bias;     // (heads, length, length), or empty
  std::vector<float> mask;     // (groups, length, length), or empty
};

// An image is classified correctly if none of its outputs is NaN and the first of the largest ones is the label's.
struct Run {
  const float* images;  // (count, channels, height, width), or (count, height, width, channels)
  int64_t count;
  uint64_t seed = 0;
  std::vector<uint32_t> samples;  // chip samples, by number
  int threads = 1;
  int chunk_blocks = 0;             // blocks of 16 images that a thread works on at a time; 0: chosen here
  size_t keep_bytes = 64 << 20;     // packed weights that a thread keeps, at most
  float* outputs = nullptr;         // (samples, count, channels, height, width), or channels last, if wanted
  bool images_last = false, outputs_last = false;  // whether channels are last
  const int64_t* labels = nullptr;  // (count), together with
  int64_t* correct = nullptr;       // (samples): number of images classified correctly
  int64_t* nonfinite = nullptr;     // (samples): number of images with an output that is NaN or infinite, if wanted
  int64_t* drawn = nullptr;         // number of noisy weights drawn, if wanted
};

// Floating-point operations an image (a multiply-add is two; taps on padding are skipped), and weights.
struct Cost {
  double shared = 0, sampled = 0;  // operations executed once; operations executed on every chip sample
  int64_t weights = 0;             // noisy weights of a chip
};

// All functions throw std::invalid_argument if sizes or value numbers do not match.
class Plan {
 public:
  Plan(Type type, const Kernels& kernels, Shape input);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan();

  int input() const { return 0; }
  Shape shape(int value) const;

  int conv(int x, const Conv& conv);
  int linear(int x, const Linear& linear);  // x is flattened
  int flatten(int x);                       // to channels, in the order (c, h, w)
  int max_pool(int x, const Window& window);
  int average_pool(int x, const Window& window);
  int adaptive_average_pool(int x, int height, int width);
  int concat(const std::vector<int>& values);  // of channels
  int channels(int x, const std::vector<int>& order);  // the channels with these numbers
  int pixels(int x, const std::vector<int>& rows, const std::vector<int>& cols);  // (i, j): x at rows[i], cols[j]; -1: 0
  int pointwise(int a, const Pointwise& pointwise);
  int add(int a, int b, const Pointwise& pointwise);  // pointwise(a + b)
  int multiply(int a, int b, const Pointwise& pointwise);  // pointwise(a * b); b may be 1 x 1 for each channel

  // pointwise((x - mean) / sqrt(variance + eps)), over the channels of each pixel; no activation of activations.h
  int layer_norm(int x, float eps, const Pointwise& pointwise);
  int group_norm(int x, int groups, float eps, const Pointwise& pointwise);  // over all pixels of a group of channels

  int attention(int q, int k, int v, const Attention& attention);  // (heads * width) channels
  // Pixel p of the (height, width) is x's pixel from[p] (zeros where it is -1) plus constant[p]: (pixels, channels) or empty.
  int gather(int x, int height, int width, const std::vector<int>& from, const std::vector<float>& constant = {});

  // Declares the output of the network; called once, after the last operation.
  void finish(int output);

  Cost cost() const;

  // Memory that `run` allocates.
  size_t bytes(const Run& run) const;

  // Keeps the inputs of the first sampled operations for all images, so call it with as many images as memory allows.
  void run(const Run& run) const;

  struct Impl;  // plan_impl.h
  const Impl& inside() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace correctnet
