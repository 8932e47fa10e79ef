// Runs a finished Plan (plan/plan.h) on a CUDA device: the same operations over numbered values, chips with the same
// weights to the bit, all samples of a layer in one launch.
//
//   cuda::Engine engine(plan, device);                    copies weights to the device
//   bytes = engine.workspace(count, samples, false);
//   engine.run({...});                                    asynchronously, on a stream
//
// Activations are NHWC, (samples, images, h, w, c); values that do not depend on noise are computed once for all
// samples. `run` allocates nothing and synchronises nothing, so that a CUDA graph can capture it; seed and samples are
// read on the device. Runtime errors are thrown as std::runtime_error with one sentence of advice; OutOfMemory is one
// of them.
//
// No CUDA header is needed to include this; a stream is a cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/chips.h"
#include "plan/plan.h"

namespace correctnet {
namespace cuda {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceRun {
  const float* images;  // (count, channels, height, width)
  int64_t count;
  Chips chips;
  float* outputs = nullptr;         // (samples, count, channels, height, width) of the output, if wanted
  const int64_t* labels = nullptr;  // (count), together with
  int64_t* correct = nullptr;       // (samples): number of images classified correctly, see Run
  int64_t* nonfinite = nullptr;     // (samples): number of images with a NaN or infinite output, only with `correct`
  void* workspace = nullptr;        // 256-byte aligned
  size_t workspace_bytes = 0;       // with less than `workspace(count, samples)`, fewer samples at a time
  bool materialise = false;         // write noisy weights to memory first instead of drawing them while loading; those
                                    // of noise that is no factor always are
  void* stream = nullptr;
};

class Engine {
 public:
  Engine(const Plan& plan, int device);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  Shape output() const;
  // Bytes for a run with all `samples` at once.
  size_t workspace(int64_t count, int64_t samples, bool materialise) const;
  void run(const DeviceRun& run) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes the noisy weights of many samples as a tensor (samples, ...). Noise that is no factor (`NoiseKind`) also reads
// `spread`, in the shape of the weight, and where devices are stuck `reach` (rows); its weights have channels last.
struct NoisyWeights {
  const float* weight;  // null: the factors alone
  void* out;
  bool bfloat16;  // type of `out`, else float32
  WeightShape shape;
  Chips chips;
  Noise noise;
  int device = 0;
  void* stream = nullptr;
  const float *spread = nullptr, *reach = nullptr;
};
void noisy_weight(const NoisyWeights& job);

// One convolution of many samples (a linear layer has a 1 x 1 kernel and image), or its gradient with respect to x:
// then x is the gradient of the output, y that of the input, and the noise is drawn again. x, weight and y are aligned
// to 16 bytes.
struct LayerRun {
  Type type;
  const void* x;  // (samples or once, images, h, w, c) of `type`
  bool x_shared;
  const float* weight;  // (out, kh, kw, in / groups), or (out, in / groups, kh, kw)
  bool channels_last;
  void* y;  // (samples, images, h, w, c) of `type`
  int64_t images;
  int channels, outputs, in_h, in_w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
      dilation_w, groups;
  const float* shift = nullptr;  // (outputs): the bias; not backward
  Chips chips;
  Noise noise;  // a factor
  bool backward = false;
  int device = 0;
  void* stream = nullptr;
};
void convolve(const LayerRun& run);

// One line on why the kernels cannot run on a device; empty if they can.
std::string problem(int device);

}  // namespace cuda
}  // namespace correctnet
