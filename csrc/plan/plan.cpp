#include "plan/plan_impl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace correctnet {

void fail(const std::string& message) { throw std::invalid_argument(message); }

namespace {

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t kMaxExtent = 1 << 30;  // positions are counted in 32 bits

int output_size(const char* name, int input, int kernel, int stride, int padding, int dilation) {
  if (kernel < 1 || stride < 1 || padding < 0 || dilation < 1)
    fail(std::string(name) + ": kernel, stride and dilation are at least 1, padding at least 0");
  const int64_t padded = input + 2 * int64_t(padding), window = int64_t(dilation) * (kernel - 1) + 1;
  if (window > padded) fail(std::string(name) + ": the kernel is larger than its padded input");
  if (padded + stride > kMaxExtent || int64_t(kernel) * dilation > kMaxExtent)
    fail(std::string(name) + ": padding, stride or dilation is too large");
  return int((padded - window) / stride + 1);
}

// The taps that fall on the input, for every output position.
std::vector<Taps> taps(int input, int output, int kernel, int stride, int padding, int dilation) {
  std::vector<Taps> all;
  for (int i = 0; i < output; ++i) {
    const int origin = i * stride - padding;
    const int first = origin < 0 ? (-origin + dilation - 1) / dilation : 0;
    const int last = origin < input ? std::min(kernel, (input - 1 - origin) / dilation + 1) : 0;
    all.push_back(first < last ? Taps{first, last, origin + first * dilation} : Taps{0, 0, 0});
  }
  return all;
}

// The windows of torch's adaptive pooling: floor(i * input / output) <= position < ceil((i + 1) * input / output).
std::vector<Taps> adaptive_windows(int input, int output) {
  std::vector<Taps> all;
  for (int64_t i = 0; i < output; ++i) {
    const int begin = int(i * input / output), end = int(((i + 1) * input + output - 1) / output);
    all.push_back({0, end - begin, begin});
  }
  return all;
}

// Outputs of each panel. Vector kernels: 6, at the end 4 where that avoids a 2, and 2 for the rest. AMX: 32.
std::vector<int> panel_widths(int outputs, int widest) {
  std::vector<int> widths;
  for (int rest = outputs; rest > 0; rest -= widths.back()) {
    const int even = rest + rest % 2;
    widths.push_back(widest > kPanelOutputs ? widest : even == 2 ? 2 : even == 4 || even == 8 ? 4 : 6);
  }
  return widths;
}

}  // namespace

int slots_of(Type type, int channels) { return type == Type::float32 ? channels : (channels + 1) / 2; }

Buffer::Buffer(size_t bytes) {
  if (bytes == 0) return;
  const size_t size = round_up(bytes, kVectorBytes);
  data_.reset(static_cast<char*>(std::aligned_alloc(kVectorBytes, size)));
  if (!data_) throw std::bad_alloc();
  memset(data_.get(), 0, size);
}

void Buffer::Free::operator()(char* p) const { std::free(p); }

const char* name(Activation activation) {
  switch (activation) {
    case Activation::none: return "none";
    case Activation::relu: return "relu";
    case Activation::clamp: return "clamp";
    case Activation::leaky: return "leaky";
    case Activation::sigmoid: return "sigmoid";
    case Activation::tanh: return "tanh";
    case Activation::silu: return "silu";
    case Activation::gelu: return "gelu";
    case Activation::gelu_tanh: return "gelu_tanh";
    case Activation::hardsigmoid: return "hardsigmoid";
    case Activation::hardswish: return "hardswish";
  }
  return "";
}

PaddedPointwise::PaddedPointwise(const Pointwise& p, int channels)
    : activation(p.activation), low(p.low), high(p.high), adc(p.adc), dac(p.dac) {
  for (const Converter& c : {adc, dac}) {
    if (!(c.inverse >= 0 && std::isfinite(c.inverse))) fail("pointwise: a converter with a negative step");
    // Up to 2^22 steps are rounded by adding 1.5 * 2^23; no converter has as many.
    if (c.inverse != 0 && !(c.steps >= 1 && c.steps <= 32767 && c.steps == std::floor(c.steps)))
      fail("pointwise: a converter has 1 to 32767 steps above 0");
  }
  if (std::isnan(low) || std::isnan(high)) fail("pointwise: a bound or slope that is NaN");
  if (activation == Activation::leaky && std::isinf(low)) fail("pointwise: an infinite slope");
  const auto padded = [channels](const std::vector<float>& v, float missing) {
    if (!v.empty() && int(v.size()) != channels)
      fail("pointwise: " + std::to_string(v.size()) + " numbers for " + std::to_string(channels) + " channels");
    std::vector<float> all = v.empty() ? std::vector<float>(channels, missing) : v;
    all.resize(round_up(channels, 2), 0.0f);
    return all;
  };
  scale = padded(p.scale, 1);
  shift = padded(p.shift, 0);
  if (!p.after_scale.empty() || !p.after_shift.empty()) {
    after_scale = padded(p.after_scale, 1);
    after_shift = padded(p.after_shift, 0);
  }
  // Zero times infinity, or infinity minus infinity, would be a NaN at one pixel that the maximum over the pool misses.
  const auto all_of = [channels](const std::vector<float>& v, const auto& good) {
    return v.empty() || std::all_of(v.begin(), v.begin() + channels, good);
  };
  const auto positive = [](float f) { return f > 0 && std::isfinite(f); };
  const auto finite = [](float f) { return std::isfinite(f); };
  monotone = all_of(scale, positive) && all_of(after_scale, positive) && all_of(shift, finite) &&
             all_of(after_shift, finite) && (activation != Activation::leaky || low >= 0);
}

Epilogue PaddedPointwise::view() const {
  Epilogue e = {scale.data(), shift.data(), nullptr, nullptr, activation, low, high, monotone, adc, dac};
  if (!after_scale.empty()) {
    e.after_scale = after_scale.data();
    e.after_shift = after_shift.data();
  }
  return e;
}

// ---- operations -----------------------------------------------------------------------------------------------------

const Value& Plan::Impl::value(int number) const {
  if (number < 0 || number >= int(values.size())) fail("plan: there is no value " + std::to_string(number));
  return values[number];
}

int Plan::Impl::append(std::unique_ptr<Operation> op, Shape shape) {
  if (output >= 0) fail("plan: it is finished");
  if (shape.channels < 1 || shape.height < 1 || shape.width < 1) fail("plan: an empty tensor");
  Value result = {};
  result.shape = shape;
  result.slots = slots_of(type, shape.channels);
  result.sampled = op->noise.has_value();
  for (int input : op->inputs) {
    result.sampled |= values[input].sampled;
    values[input].read = true;
  }
  values.push_back(result);
  operations.push_back(std::move(op));
  return int(values.size()) - 1;
}

Plan::Plan(Type type, const Kernels& kernels, Shape input)
    : impl_(std::make_unique<Impl>(type, kernels.type[static_cast<int>(type)])) {
  auto op = std::make_unique<Operation>();
  op->kind = Kind::input;
  impl_->append(std::move(op), input);
}

Plan::~Plan() = default;

Shape Plan::shape(int value) const { return impl_->value(value).shape; }

int Plan::conv(int x, const Conv& conv) {
  const Shape in = impl_->value(x).shape;
  const Type type = impl_->type;
  const int out_h = output_size("conv", in.height, conv.kernel_h, conv.stride_h, conv.padding_h, conv.dilation_h);
  const int out_w = output_size("conv", in.width, conv.kernel_w, conv.stride_w, conv.padding_w, conv.dilation_w);
  if (conv.outputs < 1 || conv.groups < 1 || in.channels % conv.groups || conv.outputs % conv.groups)
    fail("conv: " + std::to_string(conv.groups) + " groups do not divide " + std::to_string(in.channels) +
         " channels and " + std::to_string(conv.outputs) + " outputs");
  const int group_outputs = conv.outputs / conv.groups, group_channels = in.channels / conv.groups;
  const size_t weights = size_t(conv.outputs) * conv.kernel_h * conv.kernel_w * group_channels;
  if (conv.weight.size() != weights)
    fail("conv: " + std::to_string(conv.weight.size()) + " weights instead of " + std::to_string(weights));
  const bool reads = conv.noise && conv.noise->kind != NoiseKind::factor, faulty = reads && conv.noise->faults.any;
  if (conv.spread.size() != (reads ? weights : 0) || conv.reach.size() != size_t(faulty ? conv.outputs : 0))
    fail("conv: " + std::to_string(conv.spread.size()) + " spreads and " + std::to_string(conv.reach.size()) +
         " reaches do not fit the noise of " + std::to_string(weights) + " weights of " + std::to_string(conv.outputs) +
         " outputs");
  if (conv.pool && (out_h < 2 || out_w < 2)) fail("conv: its output is smaller than the pool");
  if (conv.pool && conv.pointwise.activation >= kFirstCurve)
    fail(std::string("conv: a pool cannot be fused with the activation ") + name(conv.pointwise.activation));

  // An odd number of channels wastes half a slot at every tap. If the input is the same on all chips, the columns under
  // a kernel row are turned into channels once for all of them; the order of the weights, and so their noise, is the
  // same.
  const int direct = conv.kernel_w * slots_of(type, in.channels);
  const int unfolded = slots_of(type, conv.kernel_w * in.channels);
  if (!impl_->value(x).sampled && conv.groups == 1 && 10 * unfolded <= 9 * direct) {
    Conv rows = conv;
    rows.kernel_w = rows.stride_w = rows.dilation_w = 1;
    rows.padding_w = 0;
    return this->conv(impl_->unfold(x, conv, out_w), rows);
  }

  auto op = std::make_unique<Operation>();
  op->kind = Kind::conv;
  op->inputs = {x};
  op->weight = conv.weight;
  op->spread = conv.spread;
  op->reach = conv.reach;
  op->noise = conv.noise;
  op->pointwise = PaddedPointwise(conv.pointwise, conv.outputs);
  op->rows = taps(in.height, out_h, conv.kernel_h, conv.stride_h, conv.padding_h, conv.dilation_h);
  op->cols = taps(in.width, out_w, conv.kernel_w, conv.stride_w, conv.padding_w, conv.dilation_w);
  ConvShape& shape = op->shape;
  shape.outputs = conv.outputs;
  shape.kernel_h = conv.kernel_h;
  shape.kernel_w = conv.kernel_w;
  shape.stride_h = conv.stride_h;
  shape.stride_w = conv.stride_w;
  shape.dilation_h = conv.dilation_h;
  shape.dilation_w = conv.dilation_w;
  shape.channels = in.channels;
  shape.conv_groups = conv.groups;
  shape.in_w = in.width;
  shape.in_slots = slots_of(type, in.channels);
  shape.out_h = out_h;
  shape.out_w = out_w;
  shape.rows = op->rows.data();
  shape.cols = op->cols.data();
  shape.unpadded =
      std::all_of(op->cols.begin(), op->cols.end(), [&](const Taps& t) { return t.last - t.first == conv.kernel_w; });
  shape.pool = conv.pool;
  shape.depthwise = conv.groups > 1 && group_channels == 1 && group_outputs == 1 && !conv.pool;

  // A panel reads the channels of all conv groups that its outputs belong to.
  const int slot_channels = type == Type::float32 ? 1 : 2;
  int first = 0;
  const std::vector<int> widths = shape.depthwise ? std::vector<int>{conv.outputs}
                                                  : panel_widths(conv.outputs, impl_->kernels.panel_width);
  for (int width : widths) {
    const int outputs = std::min(width, conv.outputs - first);
    const int slot = first / group_outputs * group_channels / slot_channels;
    const int channels_end = ((first + outputs - 1) / group_outputs + 1) * group_channels;
    op->panels.push_back({first, outputs, width, slot, slots_of(type, channels_end) - slot, op->packed_bytes});
    op->packed_bytes += impl_->kernels.packed_bytes(shape, op->panels.back());
    first += outputs;
  }
  if (!op->noise) {
    op->packed = Buffer(op->packed_bytes);
    impl_->kernels.pack(
        {&shape, op->weight.data(), nullptr, op->panels.data(), int(op->panels.size()), op->packed.data()});
  }
  return impl_->append(std::move(op), {conv.outputs, conv.pool ? out_h / 2 : out_h, conv.pool ? out_w / 2 : out_w});
}

int Plan::linear(int x, const Linear& linear) {
  Conv conv;
  conv.outputs = linear.outputs;
  conv.weight = linear.weight;
  conv.noise = linear.noise;
  conv.spread = linear.spread;
  conv.reach = linear.reach;
  conv.pointwise = linear.pointwise;
  return this->conv(flatten(x), conv);
}

int Plan::flatten(int x) {
  const Shape in = impl_->value(x).shape;
  if (in.height == 1 && in.width == 1) return x;
  auto op = std::make_unique<Operation>();
  op->kind = Kind::flatten;
  op->inputs = {x};
  return impl_->append(std::move(op), {in.channels * in.height * in.width, 1, 1});
}

// (channels, height, width) -> (kernel_w * channels, height, out_w), in the order (kw, c)
int Plan::Impl::unfold(int x, const Conv& conv, int out_w) {
  const Shape in = value(x).shape;
  auto op = std::make_unique<Operation>();
  op->kind = Kind::unfold;
  op->inputs = {x};
  op->kernel_w = conv.kernel_w;
  op->dilation_w = conv.dilation_w;
  op->cols = taps(in.width, out_w, conv.kernel_w, conv.stride_w, conv.padding_w, conv.dilation_w);
  return append(std::move(op), {conv.kernel_w * in.channels, in.height, out_w});
}

int Plan::Impl::pool(const char* name, int x, const Window& w, bool average) {
  const Shape in = value(x).shape;
  int out_h = output_size(name, in.height, w.kernel_h, w.stride_h, w.padding_h, 1);
  int out_w = output_size(name, in.width, w.kernel_w, w.stride_w, w.padding_w, 1);
  if (w.ceil) {
    if (average && w.include_padding) fail(std::string(name) + ": ceil goes with averages of the input alone");
    const auto one_more = [](int input, int kernel, int stride, int padding, int output) {
      return int64_t(output - 1) * stride + kernel < input + 2 * int64_t(padding) &&
             int64_t(output) * stride < int64_t(input) + padding;
    };
    out_h += one_more(in.height, w.kernel_h, w.stride_h, w.padding_h, out_h);
    out_w += one_more(in.width, w.kernel_w, w.stride_w, w.padding_w, out_w);
  }
  if (2 * w.padding_h > w.kernel_h || 2 * w.padding_w > w.kernel_w)
    fail(std::string(name) + ": padding is at most half the kernel");
  auto op = std::make_unique<Operation>();
  op->kind = Kind::pool;
  op->inputs = {x};
  op->rows = taps(in.height, out_h, w.kernel_h, w.stride_h, w.padding_h, 1);
  op->cols = taps(in.width, out_w, w.kernel_w, w.stride_w, w.padding_w, 1);
  op->average = average;
  op->divisor = w.include_padding ? w.kernel_h * w.kernel_w : 0;
  return append(std::move(op), {in.channels, out_h, out_w});
}

int Plan::max_pool(int x, const Window& window) { return impl_->pool("max_pool", x, window, false); }
int Plan::average_pool(int x, const Window& window) { return impl_->pool("average_pool", x, window, true); }

int Plan::adaptive_average_pool(int x, int height, int width) {
  const Shape in = impl_->value(x).shape;
  if (height < 1 || width < 1) fail("adaptive_average_pool: an empty output");
  if (height == in.height && width == in.width) return x;
  auto op = std::make_unique<Operation>();
  op->kind = Kind::pool;
  op->inputs = {x};
  op->rows = adaptive_windows(in.height, height);
  op->cols = adaptive_windows(in.width, width);
  op->average = true;
  return impl_->append(std::move(op), {in.channels, height, width});
}

int Plan::Impl::pointwise(std::vector<int> inputs, const Pointwise& pointwise, bool multiply) {
  const Shape in = value(inputs[0]).shape;
  for (int input : inputs) {
    const Shape other = value(input).shape;
    const bool one_pixel = multiply && other.height == 1 && other.width == 1;
    if (other.channels != in.channels || ((other.height != in.height || other.width != in.width) && !one_pixel))
      fail(std::string(multiply ? "multiply" : "add") + ": two shapes that differ");
  }
  auto op = std::make_unique<Operation>();
  op->kind = Kind::pointwise;
  op->inputs = std::move(inputs);
  op->pointwise = PaddedPointwise(pointwise, in.channels);
  op->multiply = multiply;
  return append(std::move(op), in);
}

int Plan::pointwise(int a, const Pointwise& pointwise) { return impl_->pointwise({a}, pointwise); }
int Plan::add(int a, int b, const Pointwise& pointwise) { return impl_->pointwise({a, b}, pointwise); }
int Plan::multiply(int a, int b, const Pointwise& pointwise) { return impl_->pointwise({a, b}, pointwise, true); }

int Plan::Impl::normalize(const char* kind, int x, int groups, float eps, const Pointwise& pointwise) {
  const Shape in = value(x).shape;
  if (!(eps >= 0)) fail(std::string(kind) + ": eps is at least 0");
  if (pointwise.activation >= kFirstCurve)
    fail(std::string(kind) + ": it cannot be fused with the activation " + name(pointwise.activation));
  auto op = std::make_unique<Operation>();
  op->kind = Kind::normalize;
  op->inputs = {x};
  op->pointwise = PaddedPointwise(pointwise, in.channels);
  op->eps = eps;
  op->norm_groups = groups;
  return append(std::move(op), in);
}

int Plan::layer_norm(int x, float eps, const Pointwise& pointwise) {
  return impl_->normalize("layer_norm", x, 0, eps, pointwise);
}

int Plan::group_norm(int x, int groups, float eps, const Pointwise& pointwise) {
  const int channels = impl_->value(x).shape.channels;
  if (groups < 1 || channels % groups)
    fail("group_norm: " + std::to_string(groups) + " groups do not divide " + std::to_string(channels) + " channels");
  return impl_->normalize("group_norm", x, groups, eps, pointwise);
}

int Plan::concat(const std::vector<int>& parts) {
  if (parts.empty()) fail("concat: nothing");
  auto op = std::make_unique<Operation>();
  op->kind = Kind::concat;
  op->inputs = parts;
  Shape result = impl_->value(parts[0]).shape;
  result.channels = 0;
  for (int part : parts) {
    const Shape in = impl_->value(part).shape;
    if (in.height != result.height || in.width != result.width) fail("concat: images that differ in size");
    op->pieces.push_back({int(op->pieces.size()), 0, in.channels});
    result.channels += in.channels;
  }
  return impl_->append(std::move(op), result);
}

int Plan::channels(int x, const std::vector<int>& order) {
  Shape shape = impl_->value(x).shape;
  auto op = std::make_unique<Operation>();
  op->kind = Kind::concat;
  op->inputs = {x};
  op->whole = false;
  for (int channel : order) {
    if (channel < 0 || channel >= shape.channels)
      fail("channels: there is no channel " + std::to_string(channel) + " of " + std::to_string(shape.channels));
    if (!op->pieces.empty() && op->pieces.back().first + op->pieces.back().count == channel)
      ++op->pieces.back().count;
    else
      op->pieces.push_back({0, channel, 1});
  }
  shape.channels = int(order.size());
  return impl_->append(std::move(op), shape);
}

int Plan::pixels(int x, const std::vector<int>& rows, const std::vector<int>& cols) {
  Shape shape = impl_->value(x).shape;
  const auto check = [](const std::vector<int>& of, int size) {
    for (int from : of)
      if (from < -1 || from >= size) fail("pixels: there is no row or column " + std::to_string(from));
  };
  check(rows, shape.height);
  check(cols, shape.width);
  auto op = std::make_unique<Operation>();
  op->kind = Kind::pixels;
  op->inputs = {x};
  op->row_of = rows;
  op->col_of = cols;
  shape.height = int(rows.size());
  shape.width = int(cols.size());
  return impl_->append(std::move(op), shape);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

void Plan::finish(int output) {
  impl_->value(output);
  if (impl_->output >= 0) fail("plan: it is finished");
  impl_->output = output;
  impl_->plan_memory();
}

// Four neighbouring pixels of one image block fill a register tile as well as one pixel of four blocks does. On wide
// feature maps one block at a time is faster, since its activations stay in the cache; on small maps most pixels lie at
// a border, where neighbours see different taps. So the operations before the first convolution on a small map are
// narrow. (AMX has no tiles of several pixels.)
int Plan::Impl::narrow_operations() const {
  if (kernels.panel_width > kPanelOutputs) return 0;
  for (size_t i = 0; i < operations.size(); ++i) {
    const Operation& op = *operations[i];
    if (op.kind != Kind::conv) continue;
    const auto whole = [&](const Taps& taps) { return taps.last - taps.first == op.shape.kernel_w; };
    const auto inside = std::count_if(op.cols.begin(), op.cols.end(), whole);
    if (inside < 4 || 5 * inside < 4 * op.shape.out_w) return int(i);
  }
  return int(operations.size());
}

// Values share the buffers of a worker: a buffer is free again after the last operation that reads its value. A narrow
// operation's result that wide operations read has a second storage, to which it is copied block by block.
void Plan::Impl::plan_memory() {
  Value& result = values[output];
  if (operations[output]->kind == Kind::conv && !result.read) {
    result.float_out = true;
    result.slots = result.shape.channels;
  }
  const int count = int(operations.size());
  narrow = narrow_operations();
  std::vector<int> narrow_end(count), wide_end(count);  // after which operation the storage is free
  for (int i = 0; i < count; ++i) {
    const bool is_narrow = i < narrow;
    narrow_end[i] = wide_end[i] = i;
    (is_narrow ? values[i].narrow : values[i].wide).used = true;
    for (int input : operations[i]->inputs) {
      Storage& storage = is_narrow ? values[input].narrow : values[input].wide;
      storage.used = true;
      storage.kept |= values[i].sampled && !values[input].sampled;
      (is_narrow ? narrow_end : wide_end)[input] = i;
    }
  }
  result.wide.used = true;
  result.wide.kept = !result.sampled;
  wide_end[output] = count;

  std::vector<int> free[2];
  const auto take = [&](Value& value, bool is_narrow) {
    Storage& storage = is_narrow ? value.narrow : value.wide;
    if (!storage.used || storage.kept) return;
    const size_t bytes = value.block_bytes();
    // Best fit: the free buffer that has to grow least, and the smallest of those.
    auto& unused = free[is_narrow];
    const auto best = std::min_element(unused.begin(), unused.end(), [&](int a, int b) {
      const size_t x = buffers[a].block_bytes, y = buffers[b].block_bytes;
      return std::make_pair(std::max(x, bytes) - x, x) < std::make_pair(std::max(y, bytes) - y, y);
    });
    if (best == unused.end()) {
      storage.buffer = int(buffers.size());
      buffers.push_back({bytes, is_narrow});
    } else {
      storage.buffer = *best;
      buffers[*best].block_bytes = std::max(buffers[*best].block_bytes, bytes);
      unused.erase(best);
    }
  };
  for (int i = 0; i < narrow; ++i) {
    take(values[i], true);
    for (int v = 0; v <= i; ++v)
      if (values[v].narrow.buffer >= 0 && narrow_end[v] == i) free[true].push_back(values[v].narrow.buffer);
  }
  // The copies are made before the first wide operation runs.
  for (int i = 0; i < narrow; ++i) take(values[i], false);
  for (int i = narrow; i < count; ++i) {
    take(values[i], false);
    for (int v = 0; v <= i; ++v)
      if (values[v].wide.buffer >= 0 && wide_end[v] == i) free[false].push_back(values[v].wide.buffer);
  }
}

}  // namespace correctnet
