// Implementation of Plan: plan.cpp builds it, run.cpp runs it.
#pragma once

#include <cstring>

#include "plan/plan.h"

namespace correctnet {

// Zeroed memory aligned to kVectorBytes.
class Buffer {
 public:
  explicit Buffer(size_t bytes = 0);
  char* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> data_;
};

int slots_of(Type type, int channels);

struct Storage {
  bool used = false;
  bool kept = false;  // not sampled, but read by a sampled operation: for all images
  int buffer = -1;    // of a worker, unless kept
};

struct Value {
  Shape shape;
  int slots;
  bool sampled = false;
  bool float_out = false;  // stored as float32 in a bfloat16 plan: the output of the last layer
  bool read = false;
  Storage narrow, wide;  // for one block of images; for all blocks of a chunk

  size_t block_bytes() const { return size_t(shape.height) * shape.width * slots * kVectorBytes; }
};

// `Pointwise` with all its arrays, padded for the kernels.
struct PaddedPointwise {
  std::vector<float> scale, shift, after_scale, after_shift;
  Activation activation = Activation::none;
  float low = 0, high = 0;
  Converter adc, dac;
  bool monotone = true;

  PaddedPointwise() = default;
  PaddedPointwise(const Pointwise& p, int channels);
  Epilogue view() const;
};

enum class Kind { input, conv, pool, pointwise, normalize, concat, flatten, unfold, pixels, attention, gather };

struct Operation {
  Kind kind;
  std::vector<int> inputs;  // values

  std::vector<Taps> rows, cols;  // conv, pool; unfold has cols
  PaddedPointwise pointwise;     // conv, pointwise, normalize
  float eps = 0;                 // normalize, with the number of groups of channels, or 0 for each pixel alone
  int norm_groups = 0;
  bool multiply = false;         // pointwise of two values: their product, not their sum

  // conv
  ConvShape shape{};
  std::vector<float> weight, spread, reach;
  std::optional<Noise> noise;
  std::vector<Panel> panels;
  size_t packed_bytes = 0;
  Buffer packed;  // unless there is noise

  // pool
  bool average = false;
  int divisor = 0;

  // concat
  struct Piece {
    int input, first, count;  // channels first .. first + count - 1 of inputs[input]
  };
  std::vector<Piece> pieces;
  bool whole = true;  // the pieces are the inputs

  // unfold
  int kernel_w = 0, dilation_w = 0;

  // pixels: the row and the column of x that each row and column of the result shows; -1 for zeros
  std::vector<int> row_of, col_of;

  Attention attention;
  size_t scratch = 0;  // bytes, of attention

  // gather: the pixel of x that each pixel shows (-1: zeros), and what is added, (pixels, padded channels) or empty
  std::vector<int> from;
  std::vector<float> constant;
};

struct Plan::Impl {
  Type type;
  const TypeKernels& kernels;
  std::vector<std::unique_ptr<Operation>> operations;
  std::vector<Value> values;  // values[i] is the result of operations[i]
  int output = -1;            // known when finished
  int narrow = 0;  // operations before this one process one block of images at a time, all others a whole chunk

  struct BufferSize {
    size_t block_bytes;
    bool narrow;
  };
  std::vector<BufferSize> buffers;  // of a worker

  Impl(Type type, const TypeKernels& kernels) : type(type), kernels(kernels) {}
  const Value& value(int number) const;
  int append(std::unique_ptr<Operation> op, Shape shape);
  int pool(const char* name, int x, const Window& window, bool average);
  int pointwise(std::vector<int> inputs, const Pointwise& pointwise, bool multiply = false);
  int normalize(const char* name, int x, int groups, float eps, const Pointwise& pointwise);
  int unfold(int x, const Conv& conv, int out_w);
  int narrow_operations() const;
  void plan_memory();

  struct Counts;
  struct Images;
  struct Part;
  struct Chip;
  struct Worker;
  struct Layout;
  Layout layout(const Run& run) const;
  std::vector<size_t> kept_offsets(size_t budget, size_t& bytes) const;
  char* address(int value, Worker& worker, const Images& images, const Part& part) const;
  void run_operations(Worker& worker, const Images& images, int64_t chunk, Chip* chip) const;
  void run_operation(Worker& worker, const Images& images, const Part& part, Chip* chip, int index) const;
  AttentionJob attention_job(int index, int blocks, const char* q, const char* k, const char* v, char* y,
                             char* scratch) const;
  void run_gather(int index, int blocks, const char* x, char* y) const;
  void run_conv(Worker& worker, Chip* chip, int index, const char* x, char* y, int blocks) const;
  Counts collect(Worker& worker, const Images& images, int64_t chunk, int64_t sample) const;
};

}  // namespace correctnet
