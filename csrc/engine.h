// Runs a network on many chip samples: a flat list of operations over numbered values, without Python in between.
//
//   Plan plan(Type::bfloat16, kernels(selected_isa()), {1, 32, 32});
//   int x = plan.conv(plan.input(), ...);                  every operation returns the number of its value
//   plan.finish(plan.linear(x, ...));
//   plan.run(...);
//
// An operation is *sampled* if it carries noise or follows one that does. All others are the same on every chip and run
// once, before the first chip. Then a thread takes one chip sample after the other, packs the noisy weights of a layer
// when it first needs them, and takes the images through in chunks; while maps are wide, one group of 16 images of a
// chunk after the other. The packed weights of a chip are kept from chunk to chunk as long as there is room for them;
// others are drawn again for each chunk.
//
// bfloat16: weights and activations are rounded to it, sums and the output of the last layer are float32.
//
// A NaN or an infinity goes through every operation as it does through torch's, and never reaches another image or
// chip. Two things differ: what padding would multiply is skipped, so zero times infinity is none there; and zero
// weights that fill a panel (of several groups of channels, or of AMX) meet channels and pixels of the same image
// that they have nothing to do with, so that an infinity there makes a NaN of more outputs of this image.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace correctnet {

const Kernels& kernels(Isa isa);

struct Shape {
  int channels, height, width;
};

// y = after_scale * relu(scale * x + shift) + after_shift for every channel, relu only if set. An empty vector stands
// for ones (scales) or zeros. Bias, BatchNorm in front of ReLU and BatchNorm behind it are of this form.
struct Pointwise {
  std::vector<float> scale, shift;
  bool relu = false;
  std::vector<float> after_scale, after_shift;
};

// The weights are multiplied by exp(sigma * normal + shift); `layer` is the layer's number in the noise specification.
struct LayerNoise {
  uint32_t layer;
  double sigma, shift;
};

struct Conv {
  int outputs = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;
  std::vector<float> weight;  // (outputs, kernel_h, kernel_w, channels / groups)
  std::optional<LayerNoise> noise;
  Pointwise pointwise;
  bool pool = false;  // a 2 x 2 max-pool with stride 2 behind it
};

struct Linear {
  int outputs = 0;
  std::vector<float> weight;  // (outputs, inputs)
  std::optional<LayerNoise> noise;
  Pointwise pointwise;
};

// A pool's moving window.
struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h = 0, padding_w = 0;
};

// An image is classified correctly if none of its outputs is NaN and the first largest one is at the label's place.
struct Run {
  const float* images;  // (count, channels, height, width)
  int64_t count;
  uint64_t seed = 0;
  std::vector<uint32_t> samples;  // chip samples, by number
  int threads = 1;
  int chunk_groups = 0;             // images that a thread works on at a time, divided by 16; 0: by their size
  size_t keep_bytes = 64 << 20;     // packed weights that a thread keeps, at most
  float* outputs = nullptr;         // (samples, count, channels * height * width) of the output, if wanted
  const int64_t* labels = nullptr;  // (count), together with
  int64_t* correct = nullptr;       // (samples): how many images are classified correctly (below)
  int64_t* nonfinite = nullptr;     // (samples): on how many of them an output is NaN or infinite, if wanted
  int64_t* drawn = nullptr;         // how many weights were made noisy, if wanted
};

// Floating-point operations for an image, a multiplication and an addition being two (taps on padding are not
// executed): once, and on every chip sample. And the noisy weights of a chip.
struct Cost {
  double shared = 0, sampled = 0;
  int64_t weights = 0;
};

// Everything here throws std::invalid_argument where sizes or numbers do not fit together.
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
  int average_pool(int x, const Window& window);  // padding counts as zeros
  int adaptive_average_pool(int x, int height, int width);
  int concat(const std::vector<int>& values);  // of channels
  int pointwise(int a, const Pointwise& pointwise);
  int add(int a, int b, const Pointwise& pointwise);  // pointwise(a + b)

  // `output` is the network's result; to be called once, behind the last operation.
  void finish(int output);

  Cost cost() const;

  // Of memory that `run` takes, without its arguments.
  size_t bytes(const Run& run) const;

  // Holds the activations in front of the first sampled operation for all images: give it as many as memory allows.
  void run(const Run& run) const;

  struct Impl;  // plan.h
  const Impl& inside() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace correctnet
