// Runs a finished Plan (../engine.h) on a CUDA device: the same operations over numbered values, the same chips to the
// bit of their weights, all samples of a layer in one launch.
//
//   cuda::Engine engine(plan, device);                    copies weights to the device
//   bytes = engine.workspace(count, samples, false);
//   engine.run({...});                                    on a stream, without waiting for it
//
// Activations are NHWC, (samples, images, h, w, c); values that no noise has reached are computed once for all samples.
// `run` allocates nothing and synchronises nothing, so that a CUDA graph can capture it; seed and samples are read on the
// device. Errors of the runtime become std::runtime_error with one sentence that says what to do; OutOfMemory is one.
//
// No CUDA header is needed to include this; a stream is a cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "../engine.h"

namespace correctnet {
namespace cuda {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceRun {
  const float* images;  // (count, channels, height, width)
  int64_t count;
  const uint64_t* seed;
  const uint32_t* samples;  // chip samples, by number
  int64_t sample_count;
  float* outputs = nullptr;         // (samples, count, channels, height, width) of the output, if wanted
  const int64_t* labels = nullptr;  // (count), together with
  int64_t* correct = nullptr;       // (samples): how many images are classified correctly, see Run
  int64_t* nonfinite = nullptr;     // (samples): on how many an output is NaN or infinite, if wanted beside `correct`
  void* workspace = nullptr;        // 256-byte aligned
  size_t workspace_bytes = 0;       // less than `workspace(count, samples)`: some samples at a time
  bool materialise = false;         // make noisy weights in memory first, instead of while they are loaded
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

// The noisy weights of many samples as a tensor (samples, ...): weight * exp(sigma * normal + shift).
struct NoisyWeights {
  const float* weight;  // null: the factors themselves
  void* out;
  bool bfloat16;       // of out, instead of float32
  bool channels_last;  // memory is (out, kh, kw, in), else (out, in, kh, kw)
  int64_t rows, taps, channels;
  const uint64_t* seed;
  const uint32_t* samples;
  int64_t sample_count;
  LayerNoise noise;
  int device = 0;
  void* stream = nullptr;
};
void noisy_weight(const NoisyWeights& job);

// One convolution (a linear layer is one with 1 x 1 kernel and image) of many samples, or its gradient with respect to
// x: then x is the gradient of the output, y that of the input, and the noise is made again. x, weight and y begin at
// multiples of 16 bytes.
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
  const uint64_t* seed;
  const uint32_t* samples;
  int64_t sample_count;
  LayerNoise noise;
  bool backward = false;
  int device = 0;
  void* stream = nullptr;
};
void convolve(const LayerRun& run);

// Why the kernels cannot run on a device, in one line; empty if they can.
std::string problem(int device);

}  // namespace cuda
}  // namespace correctnet
