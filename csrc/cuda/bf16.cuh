// Elements of float32 and bfloat16 (uint16_t) tensors: conversion, and access to one or four at a time.
#pragma once

#include "cuda/device.cuh"

namespace correctnet {
namespace cuda {

CN_DEVICE float to_float(float a) { return a; }
CN_DEVICE float to_float(uint16_t a) { return noise::from_bits(uint32_t(a) << 16); }

template <class T>
CN_DEVICE T from_float(float a);
template <>
CN_DEVICE float from_float<float>(float a) {
  return a;
}
template <>
CN_DEVICE uint16_t from_float<uint16_t>(float a) {
  return uint16_t(pack_bfloat16(a, 0));
}

// Rounds a weight as the CPU does: to the nearest bfloat16, but subnormal numbers, which the instruction keeps, to
// zero.
template <class T>
CN_DEVICE float rounded_weight(float a) {
  return sizeof(T) == 2 ? to_float(noise::bfloat16(a)) : a;
}

// The address is a multiple of 16 bytes (float) or of 8.
CN_DEVICE void load_four(const float* p, float (&a)[4]) {
  const float4 v = *vector_at<float4>(p);
  a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
}
CN_DEVICE void load_four(const uint16_t* p, float (&a)[4]) {
  const uint2 v = *vector_at<uint2>(p);
  a[0] = to_float(uint16_t(v.x)), a[1] = to_float(uint16_t(v.x >> 16));
  a[2] = to_float(uint16_t(v.y)), a[3] = to_float(uint16_t(v.y >> 16));
}
CN_DEVICE void store_four(float* p, const float* a) { *vector_at<float4>(p) = {a[0], a[1], a[2], a[3]}; }
CN_DEVICE void store_four(uint16_t* p, const float* a) {
  *vector_at<uint2>(p) = {pack_bfloat16(a[0], a[1]), pack_bfloat16(a[2], a[3])};
}

}  // namespace cuda
}  // namespace correctnet
