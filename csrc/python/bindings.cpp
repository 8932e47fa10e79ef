// The Python module correctnet._native. Tensors are passed as addresses, so that one build works with every version of
// torch; the callers in correctnet/noise/draw.py check types, sizes and memory orders. Plans are in bindings_plan.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/isa.h"
#include "cpu/noise_kernels.h"

namespace py = pybind11;
using namespace correctnet;

void bind_plan(py::module_& m);  // bindings_plan.cpp
void bind_cuda(py::module_& m);  // bindings_cuda.cpp, where the kernels are built

namespace {

Faults faults(const std::array<int32_t, kOutcomes - 1>& thresholds, const std::array<float, kOutcomes>& keep,
              const std::array<float, kOutcomes>& move, bool sign, float chip_gain, float column_gain) {
  Faults made = {};
  made.any = true;
  std::copy(thresholds.begin(), thresholds.end(), made.threshold);
  std::copy(keep.begin(), keep.end(), made.keep);
  std::copy(move.begin(), move.end(), made.move);
  made.sign = sign ? 0x80000000u : 0;
  made.chip_gain = chip_gain;
  made.column_gain = column_gain;
  return made;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return name(selected_isa()); });
  m.def("select_isa", &select_isa, py::arg("name"));
  const auto names = [](const std::vector<Isa>& isas) {
    std::vector<std::string> list;
    for (const Isa isa : isas) list.push_back(name(isa));
    return list;
  };
  m.def("built_isas", [names] { return names(built_isas()); });
  m.def("supported_isas", [names] { return names(supported_isas()); });

  py::class_<Faults>(m, "Faults")
      .def(py::init(&faults), py::arg("thresholds"), py::arg("keep"), py::arg("move"), py::arg("signed"),
           py::arg("chip_gain") = 0, py::arg("column_gain") = 0);

  py::class_<Noise>(m, "Noise")
      .def(py::init(&lognormal_noise), py::arg("layer"), py::arg("sigma"), py::arg("shift"), py::arg("purpose") = 0)
      .def_static(
          "spread",
          [](uint32_t layer, double sigma, double shift, const std::optional<Faults>& faults) {
            return spread_noise(layer, sigma, shift, faults.value_or(Faults{}));
          },
          py::arg("layer"), py::arg("sigma"), py::arg("shift"), py::arg("faults") = py::none())
      .def_static(
          "gaussian",
          [](uint32_t layer, const std::optional<Faults>& faults) {
            return gaussian_noise(layer, faults.value_or(Faults{}));
          },
          py::arg("layer"), py::arg("faults") = py::none());

  m.def(
      "lognormal",
      [](const Noise& noise, uint64_t seed, uint32_t sample, int64_t first, int64_t count, uintptr_t out, int threads) {
        lognormal(noise::on_chip(noise, seed, sample), first, count, reinterpret_cast<float*>(out), threads);
      },
      py::arg("noise"), py::arg("seed"), py::arg("sample"), py::arg("first"), py::arg("count"), py::arg("out"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "noisy_weight",
      [](const Noise& noise, uint64_t seed, uint32_t sample, int64_t rows, int64_t taps, int64_t channels,
         bool channels_last, uintptr_t weight, uintptr_t out, bool bfloat16, int threads, uintptr_t spread,
         uintptr_t reach) {
        const Noise on_chip = noise::on_chip(noise, seed, sample);
        const WeightShape shape{rows, taps, channels, channels_last};
        const auto floats = [](uintptr_t p) { return reinterpret_cast<const float*>(p); };
        const Nominal nominal{floats(weight), floats(spread), floats(reach)};
        if (bfloat16)
          noisy_weight(on_chip, shape, nominal, reinterpret_cast<uint16_t*>(out), threads);
        else
          noisy_weight(on_chip, shape, nominal, reinterpret_cast<float*>(out), threads);
      },
      py::arg("noise"), py::arg("seed"), py::arg("sample"), py::arg("rows"), py::arg("taps"), py::arg("channels"),
      py::arg("channels_last"), py::arg("weight"), py::arg("out"), py::arg("bfloat16"), py::arg("threads"),
      py::arg("spread") = 0, py::arg("reach") = 0, py::call_guard<py::gil_scoped_release>());

  bind_plan(m);
#if defined(CORRECTNET_CUDA)
  bind_cuda(m);
#endif
}
