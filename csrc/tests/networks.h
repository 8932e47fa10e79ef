// Networks with random weights, for Plan and any other class with the same operations.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "plan/plan.h"

enum class BatchNorm { none, before, after };  // the ReLU

struct RandomLayers {
  std::mt19937 random{5};
  double sigma;
  BatchNorm batchnorm = BatchNorm::none;
  uint32_t layer = 0;  // of the next one

  explicit RandomLayers(double sigma, BatchNorm batchnorm = BatchNorm::none) : sigma(sigma), batchnorm(batchnorm) {}

  std::vector<float> normal(size_t n, double deviation, double mean = 0) {
    std::normal_distribution<double> distribution(mean, deviation);
    std::vector<float> v(n);
    for (float& f : v) f = float(distribution(random));
    return v;
  }

  // He initialisation and a bias, BatchNorm as chosen, and a ReLU unless it is the last layer.
  correctnet::Conv conv(int channels, int outputs, int kernel, int padding = 0, bool last = false) {
    correctnet::Conv c;
    c.outputs = outputs;
    c.kernel_h = c.kernel_w = kernel;
    c.padding_h = c.padding_w = padding;
    const size_t fan_in = size_t(channels) * kernel * kernel;
    c.weight = normal(outputs * fan_in, std::sqrt(2.0 / double(fan_in)));
    c.noise = correctnet::lognormal_noise(layer++, sigma, -sigma * sigma / 2);
    c.pointwise.shift = normal(outputs, 0.1);
    if (!last) c.pointwise.activation = correctnet::Activation::relu;
    if (!last && batchnorm == BatchNorm::before) c.pointwise.scale = normal(outputs, 0.3, 1);
    if (!last && batchnorm == BatchNorm::after) {
      c.pointwise.after_scale = normal(outputs, 0.3, 1);
      c.pointwise.after_shift = normal(outputs, 0.1);
    }
    return c;
  }

  correctnet::Linear linear(int inputs, int outputs, bool last = false) {
    const correctnet::Conv c = conv(inputs, outputs, 1, 0, last);
    return {outputs, c.weight, c.noise, c.pointwise};
  }

  // A filter of the generator or the compensator: digital, so without noise.
  correctnet::Conv digital(int channels, int outputs, bool relu) {
    correctnet::Conv c = conv(channels, outputs, 1, 0, !relu);
    --layer;
    c.noise.reset();
    c.pointwise.scale.clear();
    c.pointwise.after_scale.clear();
    c.pointwise.after_shift.clear();
    return c;
  }
};

// LeNet-5 on 32 x 32 images of any number of channels.
template <class Net>
int lenet5(Net& net, double sigma) {
  RandomLayers random(sigma);
  correctnet::Conv c1 = random.conv(net.shape(net.input()).channels, 6, 5), c2 = random.conv(6, 16, 5);
  c1.pool = c2.pool = true;
  int x = net.conv(net.conv(net.input(), c1), c2);
  x = net.linear(x, random.linear(400, 120));
  x = net.linear(x, random.linear(120, 84));
  return net.linear(x, random.linear(84, 10, true));
}

// VGG16 on 32 x 32 images, its widths divided by `divisor`. The first `compensated` convolutions have a generator of
// `filters` filters and a compensator after them, as in Fig. 5 of the paper, before BatchNorm and ReLU:
//   g = relu(generator(concat(pooled input, y))),  z = compensator(concat(y, g))
template <class Net>
int vgg16(Net& net, double sigma, BatchNorm batchnorm, int divisor = 1, int compensated = 0, int filters = 0) {
  RandomLayers random(sigma, batchnorm);
  int x = net.input(), index = 0;
  for (const int width : {64, -64, 128, -128, 256, 256, -256, 512, 512, -512, 512, 512, -512}) {
    const int channels = net.shape(x).channels, outputs = std::abs(width) / divisor;
    correctnet::Conv conv = random.conv(channels, outputs, 3, 1);
    const correctnet::Pointwise pointwise = conv.pointwise;
    if (index++ < compensated) {
      conv.pointwise = {};
      const int y = net.conv(x, conv);
      const int pooled = net.adaptive_average_pool(x, net.shape(y).height, net.shape(y).width);
      const int g = net.conv(net.concat({pooled, y}), random.digital(channels + outputs, filters, true));
      conv = random.digital(outputs + filters, outputs, false);
      conv.pointwise = pointwise;
      x = net.concat({y, g});
    }
    conv.pool = width < 0;
    x = net.conv(x, conv);
  }
  x = net.linear(x, random.linear(512 / divisor, 512 / divisor));
  return net.linear(x, random.linear(512 / divisor, 10, true));
}
