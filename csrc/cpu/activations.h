// Activation functions that are neither piecewise linear nor cheap, on the lanes of lanes.h. Internal linkage.
//
// All propagate NaN, and infinities by their formulas (torch's GELU of infinity is NaN on AVX-512). The error of y of x
// against float64 is at most 5e-7 |y| + 2e-9 min(|x|, 1), with or without fused multiply-adds (test_activations in
// tests/test_lanes.cpp).
#pragma once

#include "cpu/lanes.h"

namespace correctnet {
namespace {

CN_INLINE Lanes sub(Lanes a, Lanes b) { return fma(b, splat(-1), a); }

// exp(x) = 2^n * (1 + tail), n whole and |tail| < 0.42, for |x| <= 87. The polynomial is that of Cephes' expf.
struct Exponential {
  Lanes power, tail;
};

CN_INLINE Exponential exponential(Lanes x) {
  const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Lanes shifted = fma(x, splat(1.44269504f), magic), n = sub(shifted, magic);
  Lanes r = fma(n, splat(-0.693359375f), x);  // exact: ln 2 in two parts, the first of 10 bits
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return {power_of_two(shifted), fma(mul(p, r), r, r)};
}

// exp(2 x). The square of exp(x) overflows and underflows where the result does.
CN_INLINE Lanes exp_twice(Lanes x) {
  const Exponential e = exponential(clamp(x, splat(-87), splat(87)));
  const Lanes root = fma(e.power, e.tail, e.power);
  return mul(root, root);
}

// 1 + exp(-2 x)
CN_INLINE Lanes logistic_divisor(Lanes x) { return add(splat(1), exp_twice(mul(x, splat(-1)))); }

// tanh(x) = (exp(2 x) - 1) / (exp(2 x) + 1), without cancellation; it is 1 in float32 from 9.1 on.
CN_INLINE Lanes hyperbolic_tangent(Lanes x) {
  const Exponential e = exponential(clamp(add(x, x), splat(-20), splat(20)));
  const Lanes less_one = fma(e.power, e.tail, add(e.power, splat(-1)));
  return div(less_one, add(less_one, splat(2)));
}

// The normal distribution function: half of erfc(-x / sqrt(2)), with the approximation of erfc(z), z >= 0, in Numerical
// Recipes (erfcc), whose relative error is below 1.2e-7.
CN_INLINE Lanes normal_cdf(Lanes x) {
  const Lanes z = mul(max(x, mul(x, splat(-1))), splat(0.70710678f)), t = div(splat(1), fma(z, splat(0.5f), splat(1)));
  Lanes p = splat(0.17087277f);
  p = fma(p, t, splat(-0.82215223f));
  p = fma(p, t, splat(1.48851587f));
  p = fma(p, t, splat(-1.13520398f));
  p = fma(p, t, splat(0.27886807f));
  p = fma(p, t, splat(-0.18628806f));
  p = fma(p, t, splat(0.09678418f));
  p = fma(p, t, splat(0.37409196f));
  p = fma(p, t, splat(1.00002368f));
  p = fma(p, t, splat(-1.26551223f));
  const Lanes exponent = fma(mul(z, splat(-1)), z, p);
  const Lanes below = mul(mul(t, splat(0.5f)), exp_twice(mul(exponent, splat(0.5f))));
  return if_negative(x, below, sub(splat(1), below));
}

template <Activation A>
CN_INLINE Lanes curve(Lanes x) {
  const Lanes half = mul(x, splat(0.5f));
  switch (A) {
    case Activation::sigmoid: return div(splat(1), logistic_divisor(half));
    case Activation::silu: return div(x, logistic_divisor(half));
    case Activation::tanh: return hyperbolic_tangent(x);
    case Activation::gelu: return mul(x, normal_cdf(x));
    case Activation::gelu_tanh: {  // 1 + tanh(u) = 2 / (1 + exp(-2 u))
      const Lanes cube = mul(mul(x, x), x);
      return div(x, logistic_divisor(mul(fma(cube, splat(0.044715f), x), splat(0.79788456f))));
    }
    case Activation::hardsigmoid: return div(clamp(add(x, splat(3)), splat(0), splat(6)), splat(6));
    case Activation::hardswish: return div(mul(x, clamp(add(x, splat(3)), splat(0), splat(6))), splat(6));
    default: return x;
  }
}

// Calls work(A) with the activation as a compile-time constant: `none` unless it is a curve.
template <Activation A>
struct Constant {
  static constexpr Activation value = A;
};

template <class Work>
CN_INLINE void with_curve(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::sigmoid: return work(Constant<Activation::sigmoid>());
    case Activation::tanh: return work(Constant<Activation::tanh>());
    case Activation::silu: return work(Constant<Activation::silu>());
    case Activation::gelu: return work(Constant<Activation::gelu>());
    case Activation::gelu_tanh: return work(Constant<Activation::gelu_tanh>());
    case Activation::hardsigmoid: return work(Constant<Activation::hardsigmoid>());
    case Activation::hardswish: return work(Constant<Activation::hardswish>());
    default: return work(Constant<Activation::none>());
  }
}

// Replaces `count` vectors by their activation. Not inlined into the tiles, whose registers it would take.
__attribute__((noinline)) inline void curve_all(Activation activation, float* a, int count) {
  with_curve(activation, [&](auto which) {
    for (int i = 0; i < count; ++i, a += kLanes) store(a, curve<decltype(which)::value>(load(a)));
  });
}

}  // namespace
}  // namespace correctnet
