#include "cuda/engine.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "plan/plan_impl.h"
#include "cuda/elementwise.cuh"

namespace correctnet {
namespace cuda {

namespace {

constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
template <class A, class B>
int64_t divide_up(A a, B b) {
  return (int64_t(a) + int64_t(b) - 1) / int64_t(b);
}

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is older than the CUDA toolkit that correctnet was built with; update the driver, or "
             "build with an older toolkit (CUDACXX)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidDeviceFunction:
      return "correctnet was not compiled for this GPU; install it again with its architecture in "
             "CORRECTNET_CUDA_ARCHS, e.g. CORRECTNET_CUDA_ARCHS=native";
    default: return cudaGetErrorString(error);
  }
}

// Clears the error of the runtime, so that PyTorch does not report it later.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const std::string message = std::string("CUDA, ") + what + ": " + advice(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw std::runtime_error(message);
}

// Makes a device current for its lifetime.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "device");
    changed_ = true;
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Free {
  void operator()(void* p) const { cudaFree(p); }
};
using Memory = std::unique_ptr<void, Free>;

template <class T>
Memory upload(const std::vector<T>& values) {
  if (values.empty()) return nullptr;
  void* p = nullptr;
  check(cudaMalloc(&p, values.size() * sizeof(T)), "copying a network to the device");
  Memory memory(p);
  check(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copying a network");
  return memory;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device");
  return value;
}

struct Device {
  int number, processors, shared_bytes;
  int most_samples;  // of a launch: a grid counts them in its second or third dimension
  explicit Device(int number)
      : number(number), processors(attribute(cudaDevAttrMultiProcessorCount, number)),
        shared_bytes(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, number)),
        most_samples(std::min(attribute(cudaDevAttrMaxGridDimY, number), attribute(cudaDevAttrMaxGridDimZ, number))) {}
};

// ---- one convolution ------------------------------------------------------------------------------------------------

// `origin`: the input position that tap 0 of output 0 meets, minus the padding.
struct Geometry {
  int channels, outputs, groups, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, origin_h, origin_w,
      dilation_h, dilation_w;
};

// What follows from the sizes; tensors, noise and epilogue are the caller's. Out is `T`, or float32 with `float_out`.
template <class T>
ConvArguments conv_arguments(const Geometry& g, int64_t images, bool pool, bool backward) {
  ConvArguments p = {};
  if (backward) {
    p.h = {g.out_h, 1, -g.origin_h, -g.dilation_h, g.stride_h};
    p.w = {g.out_w, 1, -g.origin_w, -g.dilation_w, g.stride_w};
    p.x_channels = g.outputs;
    p.y_channels = g.channels;
    p.out_h = g.in_h;
    p.out_w = g.in_w;
  } else {
    p.h = {g.in_h, g.stride_h, g.origin_h, g.dilation_h, 1};
    p.w = {g.in_w, g.stride_w, g.origin_w, g.dilation_w, 1};
    p.x_channels = g.channels;
    p.y_channels = g.outputs;
    p.out_h = pool ? g.out_h / 2 : g.out_h;
    p.out_w = pool ? g.out_w / 2 : g.out_w;
  }
  p.in = p.x_channels / g.groups;
  p.out = p.y_channels / g.groups;
  p.taps = g.kernel_h * g.kernel_w;
  p.k = p.taps * p.in;
  p.slices = int(divide_up(p.k * sizeof(T), kSliceBytes));
  p.by_in = Divisor(p.in);
  p.by_kernel_w = Divisor(g.kernel_w);
  const int64_t rows = images * p.out_h * p.out_w * (pool ? 4 : 1);
  // The kernel counts pixels of x and of y in 32 bits; with a stride, x has more.
  if (rows > INT32_MAX - kTileRows || images * p.h.size * p.w.size > INT32_MAX)
    throw std::invalid_argument("conv: too many pixels at once; take fewer images");
  p.rows = int(rows);
  p.tiles = int(divide_up(rows, kTileRows));
  p.x_bytes = 16;
  while (p.in * sizeof(T) % p.x_bytes || p.x_channels * sizeof(T) % p.x_bytes) p.x_bytes /= 2;
  p.transposed = backward;
  p.channels_last = true;
  p.pool = pool;
  return p;
}

// With the weights' tensor known. `noisy`: float32 that becomes noisy while it is loaded.
template <class T>
void set_weights(ConvArguments& p, const void* weight, bool noisy, bool channels_last) {
  p.weight = weight;
  p.noisy = noisy;
  p.channels_last = channels_last;
  p.weight_vectors = noisy && channels_last;
  p.weight_bytes = 0;
  if (!noisy && !p.transposed && channels_last)
    for (int bytes = 16; bytes >= 4 && !p.weight_bytes; bytes /= 2)
      if (p.k * sizeof(T) % bytes == 0) p.weight_bytes = bytes;
}

template <class T, int kN>
void launch_conv(ConvArguments p, const Device& device, int groups, int64_t samples, cudaStream_t stream) {
  constexpr int kK = kSliceBytes / int(sizeof(T));
  const int line = p.transposed ? kN : kK, period = p.transposed ? p.out : p.k;
  p.quads = line / 4 + (period % 4 != 0);
  p.by_quads = Divisor(p.quads);
  p.column_tiles = int(divide_up(p.out, kN));
  p.y_vectors = p.out % Tile<T, kN>::kColumns == 0 && p.y_channels % 4 == 0;
  p.resident = conv_shared_bytes(kN, p.slices) <= size_t(device.shared_bytes);
  const size_t shared = conv_shared_bytes(kN, p.resident ? p.slices : kStages);
  // Two blocks for each multiprocessor: enough to fill the device, and few enough that noise is made for many tiles.
  const int64_t others = int64_t(p.column_tiles) * groups * samples;
  const unsigned sweeping = unsigned(std::clamp<int64_t>(divide_up(2 * device.processors, others), 1, p.tiles));
  const dim3 grid = {sweeping, unsigned(p.column_tiles * groups), unsigned(samples)};
  check(allow_shared(conv<T, kN>, device.shared_bytes), "convolution");
  check(launch(conv<T, kN>, grid, kConvThreads, shared, stream, p), "convolution");
}

template <class T>
void run_conv(const ConvArguments& p, const Device& device, int groups, int64_t samples, cudaStream_t stream) {
  if (!p.tiles) return;
  if (p.out <= 16)
    launch_conv<T, 16>(p, device, groups, samples, stream);
  else
    launch_conv<T, 64>(p, device, groups, samples, stream);
}

// ---- the other kernels ----------------------------------------------------------------------------------------------

// `work`: items for each sample, at most one a thread; where a grid cannot have so many threads, they loop.
template <class Arguments>
void launch_elementwise(void (*kernel)(Arguments), int64_t work, int64_t samples, cudaStream_t stream,
                        const Arguments& p, const char* what) {
  const auto blocks = std::clamp<int64_t>(divide_up(work, kElementwiseThreads), 1, 1 << 16);
  check(launch(kernel, {unsigned(blocks), unsigned(samples)}, kElementwiseThreads, 0, stream, p), what);
}

// At most as many samples as a grid has room for.
template <class T>
void make_noisy(const NoisyWeights& job, cudaStream_t stream) {
  NoisyWeightArguments p = {};
  p.noise = job.noise;
  p.chips = job.chips;
  p.weight = job.weight;
  p.out = job.out;
  p.shape = job.shape;
  const auto [rows, taps, channels, channels_last] = job.shape;
  if (job.noise.kind != NoiseKind::factor) {
    const int64_t row = taps * channels, size = rows * row;
    const ArrayWeightArguments a = {job.noise, job.chips, job.weight, job.spread, job.reach, job.out, size, row};
    const dim3 grid = {unsigned(std::clamp<int64_t>(divide_up(size, 4 * kWeightThreads), 1, 1 << 12)),
                       unsigned(job.chips.count)};
    check(launch(array_weight<T>, grid, kWeightThreads, in_order_shared_bytes(), stream, a), "noisy weights");
    return;
  }
  if (channels_last || taps == 1) {
    const int64_t size = rows * taps * channels;
    const dim3 grid = {unsigned(std::clamp<int64_t>(divide_up(size, 4 * kWeightThreads), 1, 1 << 12)),
                       unsigned(job.chips.count)};
    check(launch(noisy_weight_in_order<T>, grid, kWeightThreads, in_order_shared_bytes(), stream, p), "noisy weights");
    return;
  }
  p.tile_taps = int(std::min<int64_t>(taps, kMostTile));
  p.tile_channels = int(std::min<int64_t>(channels, kMostTile));
  const int64_t tiles = rows * divide_up(channels, p.tile_channels) * divide_up(taps, p.tile_taps);
  const size_t shared = transposed_shared_bytes(p.tile_taps, p.tile_channels);
  check(launch(noisy_weight_transposed<T>, {unsigned(tiles), unsigned(job.chips.count)}, kWeightThreads, shared, stream,
               p),
        "noisy weights");
}

}  // namespace

void noisy_weight(const NoisyWeights& job) {
  const OnDevice current(job.device);
  const int64_t size = job.shape.rows * job.shape.taps * job.shape.channels, most = Device(job.device).most_samples;
  if (!size) return;
  if (job.noise.kind != NoiseKind::factor) {
    if (!job.shape.channels_last && job.shape.taps > 1 && job.shape.channels > 1)
      throw std::invalid_argument("noisy_weight: noise that is no factor needs channels last");
    if (!job.weight || !job.spread || (job.noise.faults.any && !job.reach))
      throw std::invalid_argument("noisy_weight: an array that the noise reads is missing");
  }
  const auto stream = static_cast<cudaStream_t>(job.stream);
  for (int64_t first = 0; first < job.chips.count; first += most) {
    NoisyWeights part = job;
    part.chips = job.chips.part(first, std::min(most, job.chips.count - first));
    part.out = static_cast<char*>(job.out) + first * size * (job.bfloat16 ? 2 : 4);
    if (job.bfloat16)
      make_noisy<uint16_t>(part, stream);
    else
      make_noisy<float>(part, stream);
  }
}

void convolve(const LayerRun& run) {
  if (run.noise.kind != NoiseKind::factor) throw std::invalid_argument("conv: the noise of a single layer is a factor");
  const auto out = [](int in, int kernel, int stride, int padding, int dilation) {
    return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  const int out_h = out(run.in_h, run.kernel_h, run.stride_h, run.padding_h, run.dilation_h);
  const int out_w = out(run.in_w, run.kernel_w, run.stride_w, run.padding_w, run.dilation_w);
  const Geometry g = {run.channels,   run.outputs,    run.groups,
                      run.in_h,       run.in_w,       out_h,
                      out_w,
                      run.kernel_h,   run.kernel_w,   run.stride_h,
                      run.stride_w,   -run.padding_h, -run.padding_w,
                      run.dilation_h, run.dilation_w};
  for (const void* p : {run.x, static_cast<const void*>(run.weight), static_cast<const void*>(run.y)})
    if (reinterpret_cast<uintptr_t>(p) % 16) throw std::invalid_argument("conv: tensors begin at multiples of 16 bytes");
  const OnDevice current(run.device);
  const Device device(run.device);
  const auto start = [&](auto zero) {
    using T = decltype(zero);
    ConvArguments p = conv_arguments<T>(g, run.images, false, run.backward);
    set_weights<T>(p, run.weight, true, run.channels_last);
    p.x_stride = run.x_shared ? 0 : run.images * p.h.size * p.w.size * p.x_channels;
    p.y_stride = run.images * p.out_h * p.out_w * p.y_channels;
    p.epilogue.shift = run.shift;
    p.noise = run.noise;
    for (int64_t first = 0; first < run.chips.count; first += device.most_samples) {
      p.x = static_cast<const T*>(run.x) + first * p.x_stride;
      p.y = static_cast<T*>(run.y) + first * p.y_stride;
      p.chips = run.chips.part(first, std::min<int64_t>(device.most_samples, run.chips.count - first));
      run_conv<T>(p, device, run.groups, p.chips.count, static_cast<cudaStream_t>(run.stream));
    }
  };
  if (run.type == Type::float32)
    start(float());
  else
    start(uint16_t());
}

std::string problem(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = probe(conv<uint16_t, 64>);
    if (before != device) cudaSetDevice(before);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return advice(error);
  }
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (major < 8) return "the CUDA kernels need compute capability 8.0 or newer; this GPU has " + std::to_string(major) + ".x";
  return "";
}

// ---- the engine -----------------------------------------------------------------------------------------------------

namespace {

// Arrays of an operation on the device.
struct Arrays {
  Memory weight, spread, reach, scale, shift, after_scale, after_shift, rows, cols;
  Channelwise epilogue = {};
};

// Where values lie in the workspace.
struct Places {
  std::vector<size_t> offset;  // by value
  size_t weights = 0;          // of materialised ones
  size_t bytes = 0;
};

}  // namespace

struct Engine::Impl {
  const Device device;
  Type type;
  std::vector<Operation> operations;  // without their host arrays
  std::vector<Value> values;
  std::vector<Geometry> geometry;
  std::vector<Arrays> arrays;
  int output;

  Impl(const Plan::Impl& plan, int device);
  size_t number_bytes(const Value& v) const { return v.float_out || type == Type::float32 ? 4 : 2; }
  int64_t size(const Value& v) const { return int64_t(v.shape.channels) * v.shape.height * v.shape.width; }
  Places places(int64_t count, int64_t samples, bool materialise) const;

  struct Step;
  template <class T>
  void run_operation(const Step& step, int index) const;
  template <class T>
  void collect(const Step& step) const;
};

namespace {

// The input position of tap 0 for output 0, from the taps of any output that sees the input.
int origin(const std::vector<Taps>& taps, int stride, int dilation) {
  for (size_t i = 0; i < taps.size(); ++i)
    if (taps[i].first < taps[i].last) return taps[i].start - taps[i].first * dilation - int(i) * stride;
  return 0;
}

}  // namespace

namespace {

// Whether the noisy weights of an operation are written to memory; those of noise that is no factor always are.
bool materialised(const Operation& op, bool asked) { return asked || op.noise->kind != NoiseKind::factor; }

}  // namespace

Engine::Impl::Impl(const Plan::Impl& plan, int number)
    : device(number), type(plan.type), values(plan.values), output(plan.output) {
  if (output < 0) throw std::invalid_argument("cuda: the plan is not finished");
  for (const auto& source : plan.operations) {
    Operation op;
    op.kind = source->kind;
    op.inputs = source->inputs;
    op.shape = source->shape;
    op.noise = source->noise;
    op.average = source->average;
    op.divisor = source->divisor;
    op.kernel_w = source->kernel_w;
    op.dilation_w = source->dilation_w;
    if (!source->whole) throw std::invalid_argument("cuda: there is no kernel for a selection of channels");
    if (source->kind == Kind::normalize) throw std::invalid_argument("cuda: there is no kernel for LayerNorm and GroupNorm");
    if (source->kind == Kind::pixels) throw std::invalid_argument("cuda: there is no kernel that moves pixels");
    if (source->kind == Kind::attention || source->kind == Kind::gather)
      throw std::invalid_argument("cuda: there is no kernel for attention");
    Geometry g = {};
    Arrays a;
    if (op.kind == Kind::conv) {
      const ConvShape& s = source->shape;
      const Shape in = values[op.inputs[0]].shape;
      g = {s.channels,  s.outputs,  s.conv_groups, in.height,
           in.width,    s.out_h,    s.out_w,    s.kernel_h,
           s.kernel_w,  s.stride_h, s.stride_w, origin(source->rows, s.stride_h, s.dilation_h),
           origin(source->cols, s.stride_w, s.dilation_w), s.dilation_h, s.dilation_w};
      a.spread = upload(source->spread);
      a.reach = upload(source->reach);
      if (op.noise || type == Type::float32) {
        a.weight = upload(source->weight);
      } else {
        std::vector<uint16_t> rounded;
        for (float w : source->weight) rounded.push_back(noise::bfloat16(w));
        a.weight = upload(rounded);
      }
    }
    if (op.kind == Kind::conv || op.kind == Kind::pointwise) {
      const PaddedPointwise& f = source->pointwise;
      a.scale = upload(f.scale);
      a.shift = upload(f.shift);
      a.after_scale = upload(f.after_scale);
      a.after_shift = upload(f.after_shift);
      const auto floats = [](const Memory& m) { return static_cast<const float*>(m.get()); };
      if (f.activation > Activation::relu)
        throw std::invalid_argument(std::string("cuda: there is no kernel for the activation ") + name(f.activation));
      if (source->multiply) throw std::invalid_argument("cuda: there is no kernel for products of two values");
      a.epilogue = {floats(a.scale), floats(a.shift), floats(a.after_scale), floats(a.after_shift),
                    f.activation == Activation::relu, f.adc, f.dac};
    }
    if (op.kind == Kind::pool) a.rows = upload(source->rows);
    if (op.kind == Kind::pool || op.kind == Kind::unfold) a.cols = upload(source->cols);
    operations.push_back(std::move(op));
    geometry.push_back(g);
    arrays.push_back(std::move(a));
  }
}

Engine::Engine(const Plan& plan, int device) {
  const OnDevice current(device);
  impl_ = std::make_unique<Impl>(plan.inside(), device);
}

Engine::~Engine() = default;

Shape Engine::output() const { return impl_->values[impl_->output].shape; }

// First fit: a value occupies the first place that is free during its lifetime, from the operation that computes it to
// the last one that reads it, or to the end if it is the same on all samples and a sampled operation reads it.
Places Engine::Impl::places(int64_t count, int64_t samples, bool materialise) const {
  const int n = int(operations.size());
  std::vector<int> end(n);
  for (int i = 0; i < n; ++i) {
    end[i] = i;
    for (int input : operations[i].inputs)
      end[input] = values[i].sampled && !values[input].sampled ? n : std::max(end[input], i);
  }
  end[output] = n;
  Places places;
  places.offset.resize(n);
  std::map<size_t, std::pair<size_t, int>> taken;  // offset: (bytes, end)
  // Values that are the same on all samples are computed first.
  for (const bool sampled : {false, true})
    for (int i = 0; i < n; ++i) {
      if (values[i].sampled != sampled) continue;
      const size_t bytes = aligned(count * (sampled ? samples : 1) * size(values[i]) * number_bytes(values[i]));
      size_t at = 0;
      for (const auto& [offset, who] : taken) {
        if (offset >= at + bytes) break;
        at = offset + who.first;
      }
      places.offset[i] = at;
      places.bytes = std::max(places.bytes, at + bytes);
      taken[at] = {bytes, end[i]};
      for (auto it = taken.begin(); it != taken.end();) it = it->second.second <= i ? taken.erase(it) : std::next(it);
    }
  places.weights = places.bytes;
  size_t most = 0;
  for (int i = 0; i < n; ++i)
    if (operations[i].noise && materialised(operations[i], materialise)) {
      const Geometry& g = geometry[i];
      const size_t weights = size_t(g.outputs) * g.kernel_h * g.kernel_w * (g.channels / g.groups);
      most = std::max(most, aligned(samples * weights * (type == Type::float32 ? 4 : 2)));
    }
  places.bytes += most;
  return places;
}

size_t Engine::workspace(int64_t count, int64_t samples, bool materialise) const {
  if (count < 1 || samples < 1) throw std::invalid_argument("cuda: images and samples are at least 1");
  return impl_->places(count, samples, materialise).bytes;
}

// Some of the samples of a run, from `first` on.
struct Engine::Impl::Step {
  const DeviceRun& run;
  int64_t first;
  Chips chips;
  const Places& places;
  cudaStream_t stream;

  char* at(int value) const { return static_cast<char*>(run.workspace) + places.offset[value]; }
};

void Engine::run(const DeviceRun& run) const {
  const Impl& plan = *impl_;
  const Shape out = plan.values[plan.output].shape;
  if (run.count < 1 || run.chips.count < 1) throw std::invalid_argument("cuda: images and samples are at least 1");
  if ((run.labels == nullptr) != (run.correct == nullptr))
    throw std::invalid_argument("cuda: labels or correct are missing");
  if (run.correct && (out.height != 1 || out.width != 1))
    throw std::invalid_argument("cuda: the output is no vector of classes");
  if (run.nonfinite && !run.correct) throw std::invalid_argument("cuda: nonfinite is counted beside correct");
  int64_t together = std::min<int64_t>(run.chips.count, plan.device.most_samples);
  while (plan.places(run.count, together, run.materialise).bytes > run.workspace_bytes) {
    if (together == 1) throw std::invalid_argument("cuda: the workspace is too small for one sample");
    together = divide_up(together, 2);
  }
  const OnDevice current(plan.device.number);
  const Places places = plan.places(run.count, together, run.materialise);
  const auto stream = static_cast<cudaStream_t>(run.stream);
  for (int64_t* counts : {run.correct, run.nonfinite})
    if (counts) check(cudaMemsetAsync(counts, 0, run.chips.count * 8, stream), "counts");
  for (int64_t first = 0; first < run.chips.count; first += together) {
    const Impl::Step step{run, first, run.chips.part(first, std::min(together, run.chips.count - first)), places, stream};
    const auto all = [&](auto zero) {
      using T = decltype(zero);
      for (const bool sampled : {false, true}) {
        if (!sampled && first > 0) continue;
        for (int i = 0; i < int(plan.operations.size()); ++i)
          if (plan.values[i].sampled == sampled) plan.run_operation<T>(step, i);
      }
      plan.collect<T>(step);
    };
    if (plan.type == Type::float32)
      all(float());
    else
      all(uint16_t());
  }
}

template <class T>
void Engine::Impl::run_operation(const Step& step, int index) const {
  const Operation& op = operations[index];
  const Arrays& a = arrays[index];
  const Value& out = values[index];
  const int64_t count = step.run.count, samples = out.sampled ? step.chips.count : 1;
  const auto stride = [&](int value) { return values[value].sampled ? count * size(values[value]) : 0; };
  const int64_t pixels = count * out.shape.height * out.shape.width;
  void* const y = step.at(index);
  // Four channels at a time where that is aligned.
  const auto vectors = [](int channels) { return channels % 4 == 0; };
  const auto work = [&](int channels) { return pixels * (vectors(channels) ? channels / 4 : channels); };
  const int x = op.inputs.empty() ? -1 : op.inputs[0];
  switch (op.kind) {
    case Kind::input: {
      const TransposeArguments p = {step.run.images, y,    0, 0, count, out.shape.channels, out.shape.height * out.shape.width,
                                    true};
      launch_elementwise(transpose<float, T>, count * size(out), 1, step.stream, p, "input");
      break;
    }
    case Kind::conv: {
      ConvArguments p = conv_arguments<T>(geometry[index], count, op.shape.pool, false);
      p.x = step.at(x);
      p.x_stride = stride(x);
      p.y = y;
      p.y_stride = stride(index);
      p.float_out = out.float_out;
      p.epilogue = a.epilogue;
      const bool written = op.noise && materialised(op, step.run.materialise);
      set_weights<T>(p, a.weight.get(), op.noise && !written, true);
      if (op.noise) {
        p.noise = *op.noise;
        p.chips = step.chips;
        if (written) {
          void* const weights = static_cast<char*>(step.run.workspace) + step.places.weights;
          const WeightShape shape = {geometry[index].outputs, p.taps, p.in, true};
          NoisyWeights job = {static_cast<const float*>(a.weight.get()), weights, sizeof(T) == 2, shape, step.chips,
                              *op.noise};
          job.spread = static_cast<const float*>(a.spread.get());
          job.reach = static_cast<const float*>(a.reach.get());
          make_noisy<T>(job, step.stream);
          p.weight = weights;
          p.weight_stride = int64_t(geometry[index].outputs) * p.k;
        }
      }
      run_conv<T>(p, device, geometry[index].groups, samples, step.stream);
      break;
    }
    case Kind::pool: {
      const Shape in = values[x].shape;
      const PoolArguments p = {step.at(x),       y,
                               stride(x),        stride(index),
                               pixels,           out.shape.channels,
                               in.height,        in.width,
                               out.shape.height, out.shape.width,
                               static_cast<const Taps*>(a.rows.get()), static_cast<const Taps*>(a.cols.get()),
                               op.average,       op.divisor};
      const auto kernel = vectors(p.channels) ? pool<T, 4> : pool<T, 1>;
      launch_elementwise(kernel, work(p.channels), samples, step.stream, p, "pool");
      break;
    }
    case Kind::pointwise: {
      const bool two = op.inputs.size() > 1;
      const PointwiseArguments p = {step.at(x),
                                    two ? step.at(op.inputs[1]) : nullptr,
                                    y,
                                    stride(x),
                                    two ? stride(op.inputs[1]) : 0,
                                    stride(index),
                                    pixels,
                                    out.shape.channels,
                                    a.epilogue};
      const auto kernel = vectors(p.channels) ? pointwise<T, 4> : pointwise<T, 1>;
      launch_elementwise(kernel, work(p.channels), samples, step.stream, p, "pointwise");
      break;
    }
    case Kind::normalize:
    case Kind::attention:
    case Kind::gather:
    case Kind::pixels: break;  // refused above
    case Kind::concat: {
      int first = 0;
      for (int part : op.inputs) {
        const int channels = values[part].shape.channels;
        const ConcatArguments p = {step.at(part), y,     stride(part), stride(index), pixels, channels, first,
                                   out.shape.channels};
        const bool four = channels % 4 == 0 && first % 4 == 0 && out.shape.channels % 4 == 0;
        const auto kernel = four ? concat<T, 4> : concat<T, 1>;
        launch_elementwise(kernel, pixels * (four ? channels / 4 : channels), samples, step.stream, p, "concat");
        first += channels;
      }
      break;
    }
    case Kind::flatten: {
      const Shape in = values[x].shape;
      const TransposeArguments p = {step.at(x),  y, stride(x), stride(index), count, in.channels, in.height * in.width,
                                    false};
      launch_elementwise(transpose<T, T>, count * size(out), samples, step.stream, p, "flatten");
      break;
    }
    case Kind::unfold: {
      const Shape in = values[x].shape;
      const UnfoldArguments p = {step.at(x),   y,           pixels,        in.channels, in.width,
                                 out.shape.width, op.kernel_w, op.dilation_w, static_cast<const Taps*>(a.cols.get())};
      launch_elementwise(unfold<T>, pixels * out.shape.channels, 1, step.stream, p, "unfold");
      break;
    }
  }
}

template <class T>
void Engine::Impl::collect(const Step& step) const {
  const Value& v = values[output];
  const int64_t count = step.run.count, each = v.sampled ? count * size(v) : 0;
  const bool floats = v.float_out || sizeof(T) == 4;
  if (step.run.outputs) {
    TransposeArguments p = {step.at(output), step.run.outputs + step.first * count * size(v), each, count * size(v), count,
                            v.shape.channels, v.shape.height * v.shape.width, false};
    const auto kernel = floats ? transpose<float, float> : transpose<T, float>;
    launch_elementwise(kernel, count * size(v), step.chips.count, step.stream, p, "outputs");
  }
  if (step.run.correct) {
    const auto counts = [&](int64_t* all) {
      return all ? reinterpret_cast<unsigned long long*>(all) + step.first : nullptr;
    };
    const CountArguments p = {step.at(output), each, count, v.shape.channels, step.run.labels,
                              counts(step.run.correct), counts(step.run.nonfinite)};
    const auto kernel = floats ? count_correct<float> : count_correct<T>;
    launch_elementwise(kernel, count * 32, step.chips.count, step.stream, p, "counts");
  }
}

}  // namespace cuda
}  // namespace correctnet
