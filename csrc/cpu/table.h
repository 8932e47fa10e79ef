// Defines the table of kernels.h for the instruction set that the including file is compiled for.
#pragma once

#include "cpu/attention.h"
#include "cpu/conv.h"
#include "cpu/depthwise.h"
#include "cpu/pack.h"
#include "cpu/peak.h"

namespace correctnet {
namespace {

template <class Math, size_t (*bytes)(const ConvShape&, const Panel&)>
size_t packed_bytes_of(const ConvShape& shape, const Panel& panel) {
  return shape.depthwise ? depthwise_bytes<Math>(shape) : bytes(shape, panel);
}

template <class Math, void (*other)(const PackJob&)>
void pack_of(const PackJob& job) {
  job.shape->depthwise ? depthwise_pack<Math>(job) : other(job);
}

template <class Math, void (*other)(const ConvJob&)>
void conv_of(const ConvJob& job) {
  job.shape->depthwise ? depthwise<Math>(job) : other(job);
}

template <class Math>
constexpr TypeKernels type_kernels() {
  return {packed_bytes_of<Math, packed_bytes<Math>>, nullptr, pack_of<Math, pack<Math>>, conv_of<Math, conv<Math>>,
          pool<Math>, pointwise<Math>, normalize<Math>, flatten<Math>,
          assemble<Math>, attention<Math>, kPanelOutputs, peak<Math>};
}

}  // namespace
}  // namespace correctnet
