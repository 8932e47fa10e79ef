// The Python module correctnet._native. Tensors come as addresses, so that one build serves every version of torch;
// correctnet/noise/core.py, which calls them, sees to their types, sizes and memory orders. Plans are in bindings_plan.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"
#include "noise_kernels.h"

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
      .def(py::init([](uint64_t seed, uint32_t layer, uint32_t sample, double sigma, double shift, uint32_t purpose) {
             return Noise{seed, layer, sample, sigma, shift, purpose};
           }),
           py::arg("seed"), py::arg("layer"), py::arg("sample"), py::arg("sigma"), py::arg("shift"), py::arg("purpose"));

  m.def(
      "lognormal",
      [](const Noise& noise, int64_t first, int64_t count, uintptr_t out, int threads) {
        lognormal(noise, first, count, reinterpret_cast<float*>(out), threads);
      },
      py::arg("noise"), py::arg("first"), py::arg("count"), py::arg("out"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "noisy_weight",
      [](const Noise& noise, int64_t rows, int64_t taps, int64_t channels, bool channels_last, uintptr_t weight,
         uintptr_t out, bool bfloat16, int threads) {
        const Layer layer{rows, taps, channels, channels_last};
        const float* w = reinterpret_cast<const float*>(weight);
        if (bfloat16)
          noisy_weight(noise, layer, w, reinterpret_cast<uint16_t*>(out), threads);
        else
          noisy_weight(noise, layer, w, reinterpret_cast<float*>(out), threads);
      },
      py::arg("noise"), py::arg("rows"), py::arg("taps"), py::arg("channels"), py::arg("channels_last"),
      py::arg("weight"), py::arg("out"), py::arg("bfloat16"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  bind_plan(m);
#if defined(CORRECTNET_CUDA)
  bind_cuda(m);
#endif
}
