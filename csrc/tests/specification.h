// Specification of the operations of a Plan in plain loops, one number at a time, for the tests to compare with.
// Tensors are (n, c, h, w).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "plan/plan.h"

namespace specification {

using correctnet::Conv;
using correctnet::Pointwise;
using correctnet::Shape;

struct Tensor {
  Shape shape;
  int count;
  std::vector<float> data;

  Tensor(Shape shape, int count)
      : shape(shape), count(count), data(size_t(count) * shape.channels * shape.height * shape.width) {}
  float& at(int n, int c, int h, int w) {
    return data[((size_t(n) * shape.channels + c) * shape.height + h) * shape.width + w];
  }
  float at(int n, int c, int h, int w) const { return const_cast<Tensor*>(this)->at(n, c, h, w); }
};

// As PyTorch's documentation defines them.
inline double activation(const Pointwise& p, double a) {
  using correctnet::Activation;
  const double six = std::min(std::max(a + 3, 0.0), 6.0);
  if (std::isnan(a)) return a;
  switch (p.activation) {
    case Activation::none: return a;
    case Activation::relu: return a < 0 ? 0 : a;
    case Activation::clamp: return std::min(std::max(a, double(p.low)), double(p.high));
    case Activation::leaky: return a < 0 ? p.low * a : a;
    case Activation::sigmoid: return 1 / (1 + std::exp(-a));
    case Activation::tanh: return std::tanh(a);
    case Activation::silu: return a / (1 + std::exp(-a));
    case Activation::gelu: return a * std::erfc(-a / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh: return a / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
    case Activation::hardsigmoid: return six / 6;
    case Activation::hardswish: return a * six / 6;
  }
  return a;
}

// std::nearbyint rounds halves to even.
inline double converted(const correctnet::Converter& c, double a) {
  if (c.inverse == 0 || std::isnan(a)) return a;
  return std::nearbyint(std::min(std::max(a * double(c.inverse), -double(c.steps)), double(c.steps)));
}

template <class Sum>
Sum apply(const Pointwise& p, int channel, Sum a) {
  a = Sum(converted(p.adc, a));
  if (!p.scale.empty()) a = a * p.scale[channel];
  if (!p.shift.empty()) a = a + p.shift[channel];
  a = Sum(activation(p, a));
  if (!p.after_scale.empty()) a = a * p.after_scale[channel];
  if (!p.after_shift.empty()) a = a + p.after_shift[channel];
  return Sum(converted(p.dac, a));
}

inline int output_size(int input, int kernel, int stride, int padding, int dilation) {
  return (input + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// With `ceil`, as many windows as begin before the padding at the end and see more than those before.
inline int windows(int input, int kernel, int stride, int padding, bool ceil) {
  int count = output_size(input, kernel, stride, padding, 1);
  while (ceil && (count - 1) * stride + kernel < input + 2 * padding && count * stride < input + padding) ++count;
  return count;
}

inline Tensor max_pool(const Tensor& x, const correctnet::Window& p) {
  const Shape s = x.shape;
  Tensor y({s.channels, windows(s.height, p.kernel_h, p.stride_h, p.padding_h, p.ceil),
            windows(s.width, p.kernel_w, p.stride_w, p.padding_w, p.ceil)},
           x.count);
  for (int n = 0; n < x.count; ++n)
    for (int c = 0; c < s.channels; ++c)
      for (int i = 0; i < y.shape.height; ++i)
        for (int j = 0; j < y.shape.width; ++j) {
          float best = -INFINITY;
          for (int h = i * p.stride_h - p.padding_h; h < i * p.stride_h - p.padding_h + p.kernel_h; ++h)
            for (int w = j * p.stride_w - p.padding_w; w < j * p.stride_w - p.padding_w + p.kernel_w; ++w)
              if (h >= 0 && h < s.height && w >= 0 && w < s.width)
                if (const float a = x.at(n, c, h, w); a > best || std::isnan(a)) best = a;
          y.at(n, c, i, j) = best;
        }
  return y;
}

// The mean over begin(i) <= h < end(i) and columns likewise; positions outside the input count as zeros.
template <class Begin, class End>
Tensor average_pool(const Tensor& x, int height, int width, const Begin& begin, const End& end) {
  Tensor y({x.shape.channels, height, width}, x.count);
  for (int n = 0; n < x.count; ++n)
    for (int c = 0; c < x.shape.channels; ++c)
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          double sum = 0;
          const int top = begin(i, x.shape.height, height), bottom = end(i, x.shape.height, height);
          const int left = begin(j, x.shape.width, width), right = end(j, x.shape.width, width);
          for (int h = std::max(top, 0); h < std::min(bottom, x.shape.height); ++h)
            for (int w = std::max(left, 0); w < std::min(right, x.shape.width); ++w) sum += x.at(n, c, h, w);
          y.at(n, c, i, j) = float(sum / ((bottom - top) * (right - left)));
        }
  return y;
}

inline Tensor adaptive_average_pool(const Tensor& x, int height, int width) {
  const auto begin = [](int i, int in, int out) { return i * in / out; };
  const auto end = [](int i, int in, int out) { return ((i + 1) * in + out - 1) / out; };
  return average_pool(x, height, width, begin, end);
}

inline Tensor concat(const std::vector<const Tensor*>& parts) {
  Shape s = parts[0]->shape;
  s.channels = 0;
  for (const Tensor* part : parts) s.channels += part->shape.channels;
  Tensor y(s, parts[0]->count);
  int first = 0;
  for (const Tensor* part : parts) {
    for (int n = 0; n < y.count; ++n)
      for (int c = 0; c < part->shape.channels; ++c)
        for (int h = 0; h < s.height; ++h)
          for (int w = 0; w < s.width; ++w) y.at(n, first + c, h, w) = part->at(n, c, h, w);
    first += part->shape.channels;
  }
  return y;
}

// Convolution, pointwise function and pool, with sums of type `Sum`; ignores conv.noise.
template <class Sum>
Tensor conv(const Tensor& x, const Conv& c) {
  const Shape in = x.shape;
  const int channels = in.channels / c.groups;
  Tensor y({c.outputs, output_size(in.height, c.kernel_h, c.stride_h, c.padding_h, c.dilation_h),
            output_size(in.width, c.kernel_w, c.stride_w, c.padding_w, c.dilation_w)},
           x.count);
  for (int n = 0; n < x.count; ++n)
    for (int o = 0; o < c.outputs; ++o)
      for (int i = 0; i < y.shape.height; ++i)
        for (int j = 0; j < y.shape.width; ++j) {
          Sum sum = 0;
          for (int ky = 0; ky < c.kernel_h; ++ky)
            for (int kx = 0; kx < c.kernel_w; ++kx) {
              const int h = i * c.stride_h - c.padding_h + ky * c.dilation_h;
              const int w = j * c.stride_w - c.padding_w + kx * c.dilation_w;
              if (h < 0 || h >= in.height || w < 0 || w >= in.width) continue;
              for (int k = 0; k < channels; ++k)
                sum += Sum(x.at(n, o / (c.outputs / c.groups) * channels + k, h, w)) *
                       Sum(c.weight[((size_t(o) * c.kernel_h + ky) * c.kernel_w + kx) * channels + k]);
            }
          y.at(n, o, i, j) = float(apply(c.pointwise, o, sum));
        }
  return c.pool ? max_pool(y, {2, 2, 2, 2}) : y;
}

}  // namespace specification
