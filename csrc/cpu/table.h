// Defines the table of kernels.h for the instruction set that the including file is compiled for.
#pragma once

#include "cpu/conv.h"
#include "cpu/pack.h"
#include "cpu/peak.h"

namespace correctnet {
namespace {

template <class Math>
constexpr TypeKernels type_kernels() {
  return {packed_bytes<Math>, nullptr, pack<Math>, conv<Math>, pool<Math>, pointwise<Math>, flatten<Math>,
          assemble<Math>, kPanelOutputs, peak<Math>};
}

}  // namespace
}  // namespace correctnet
