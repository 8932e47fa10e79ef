// Shared by the files of the Python module: a plan with the properties that arguments are checked against.
#pragma once

#include <pybind11/numpy.h>

#include <string>
#include <vector>

#include "plan/plan.h"

namespace correctnet {

// Floats are converted if type or memory order differ; arrays that are large or written to are not.
using Floats = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;
using Images = pybind11::array_t<float, pybind11::array::c_style>;
using Labels = pybind11::array_t<int64_t, pybind11::array::c_style>;

inline Type type_named(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "bfloat16") return Type::bfloat16;
  fail("precision: 'float32' or 'bfloat16', not '" + name + "'");
}

struct BoundPlan {
  Shape input;
  std::string precision, isa;
  Plan plan;
  int output = -1;

  BoundPlan(const std::string& precision, Shape input)
      : input(input), precision(precision), isa(kernels(selected_isa()).name),
        plan(type_named(precision), kernels(selected_isa()), input) {}

  void check_images(const Images& images, bool last) const {
    const std::vector<int> sizes = last ? std::vector<int>{input.height, input.width, input.channels}
                                        : std::vector<int>{input.channels, input.height, input.width};
    bool fits = images.ndim() == 4 && images.shape(0) > 0;
    for (int i = 0; fits && i < 3; ++i) fits = images.shape(i + 1) == sizes[i];
    if (!fits)
      fail("images: (count, " + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ", " +
           std::to_string(sizes[2]) + ") is expected");
  }

  Run run(int64_t count, const std::vector<uint32_t>& samples, int threads, size_t keep_bytes) const {
    Run run = {};
    run.count = count;
    run.samples = samples;
    run.threads = threads;
    run.keep_bytes = keep_bytes;
    return run;
  }
};

}  // namespace correctnet
