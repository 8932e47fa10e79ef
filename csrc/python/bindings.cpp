// The Python module correctnet._native. Tensors are passed as addresses, so that one build works with every version of
// torch; the callers in correctnet/noise/draw.py check types, sizes and memory orders. Plans are in bindings_plan.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/noise_kernels.h"

namespace py = pybind11;
using namespace correctnet;

void bind_plan(py::module_& m);  // bindings_plan.cpp
void bind_cuda(py::module_& m);  // bindings_cuda.cpp, where the kernels are built

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

  py::class_<Noise>(m, "Noise")
      .def(py::init(&lognormal_noise), py::arg("layer"), py::arg("sigma"), py::arg("shift"), py::arg("purpose") = 0);

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
         bool channels_last, uintptr_t weight, uintptr_t out, bool bfloat16, int threads) {
        const Noise on_chip = noise::on_chip(noise, seed, sample);
        const WeightShape shape{rows, taps, channels, channels_last};
        const float* w = reinterpret_cast<const float*>(weight);
        if (bfloat16)
          noisy_weight(on_chip, shape, w, reinterpret_cast<uint16_t*>(out), threads);
        else
          noisy_weight(on_chip, shape, w, reinterpret_cast<float*>(out), threads);
      },
      py::arg("noise"), py::arg("seed"), py::arg("sample"), py::arg("rows"), py::arg("taps"), py::arg("channels"),
      py::arg("channels_last"), py::arg("weight"), py::arg("out"), py::arg("bfloat16"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  bind_plan(m);
#if defined(CORRECTNET_CUDA)
  bind_cuda(m);
#endif
}
