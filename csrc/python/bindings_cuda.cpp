// correctnet._native.cuda: the CUDA kernels (cuda/engine.h). Device memory is passed as integer addresses and owned by
// the callers in correctnet/noise/device.py, correctnet/engine/cuda.py and correctnet/crossbar/kernels.py.
#if defined(CORRECTNET_SHIM)
#include "cuda/device.cuh"
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/bindings_plan.h"
#include "cuda/engine.h"

namespace py = pybind11;
using namespace correctnet;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cuda::Chips chips(Address seed, Address samples, int64_t count) {
  return {at<uint64_t>(seed), at<uint32_t>(samples), count};
}

}  // namespace

void bind_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda");
  m.attr("architectures") = CORRECTNET_CUDA_ARCHS;
#if defined(CORRECTNET_SHIM)
  m.attr("device_type") = "cpu";
  // Lets the next call of a runtime function fail for lack of memory.
  m.def("out_of_memory", [](const std::string& call) {
    static std::string failing;
    shim_failing = (failing = call).c_str();
    shim_failure = cudaErrorMemoryAllocation;
  });
#else
  m.attr("device_type") = "cuda";
#endif
  py::register_exception<cuda::OutOfMemory>(m, "OutOfMemory", PyExc_MemoryError);
  // The reason why the kernels cannot run on a device, or None.
  m.def(
      "problem",
      [](int device) {
        const std::string why = cuda::problem(device);
        return why.empty() ? std::optional<std::string>() : why;
      },
      py::arg("device"));

  py::class_<cuda::Engine>(m, "Engine")
      .def(py::init([](const BoundPlan& plan, int device) { return std::make_unique<cuda::Engine>(plan.plan, device); }),
           py::arg("plan"), py::arg("device"))
      .def_property_readonly("output_shape",
                             [](const cuda::Engine& e) {
                               const Shape s = e.output();
                               return std::make_tuple(s.channels, s.height, s.width);
                             })
      .def("workspace", &cuda::Engine::workspace, py::arg("count"), py::arg("samples"), py::arg("materialise"))
      .def(
          "run",
          [](const cuda::Engine& engine, Address images, int64_t count, Address seed, Address samples,
             int64_t sample_count, Address outputs, Address labels, Address correct, Address nonfinite,
             Address workspace, size_t workspace_bytes, bool materialise, Address stream) {
            cuda::DeviceRun run = {at<float>(images), count, chips(seed, samples, sample_count)};
            run.outputs = at<float>(outputs);
            run.labels = at<int64_t>(labels);
            run.correct = at<int64_t>(correct);
            run.nonfinite = at<int64_t>(nonfinite);
            run.workspace = at<void>(workspace);
            run.workspace_bytes = workspace_bytes;
            run.materialise = materialise;
            run.stream = at<void>(stream);
            py::gil_scoped_release unlocked;
            engine.run(run);
          },
          py::kw_only(), py::arg("images"), py::arg("count"), py::arg("seed"), py::arg("samples"),
          py::arg("sample_count"), py::arg("outputs") = 0, py::arg("labels") = 0, py::arg("correct") = 0,
          py::arg("nonfinite") = 0, py::arg("workspace"), py::arg("workspace_bytes"),
          py::arg("materialise") = false, py::arg("stream") = 0);

  m.def(
      "noisy_weight",
      [](Address weight, Address out, bool bfloat16, int64_t rows, int64_t taps, int64_t channels, bool channels_last,
         Address seed, Address samples, int64_t sample_count, const Noise& noise, int device, Address stream,
         Address spread, Address reach) {
        cuda::noisy_weight({at<float>(weight), at<void>(out), bfloat16, {rows, taps, channels, channels_last},
                            chips(seed, samples, sample_count), noise, device, at<void>(stream), at<float>(spread),
                            at<float>(reach)});
      },
      py::kw_only(), py::arg("weight"), py::arg("out"), py::arg("bfloat16"), py::arg("rows"), py::arg("taps"),
      py::arg("channels"), py::arg("channels_last"), py::arg("seed"), py::arg("samples"), py::arg("sample_count"),
      py::arg("noise"), py::arg("device"), py::arg("stream") = 0, py::arg("spread") = 0, py::arg("reach") = 0,
      py::call_guard<py::gil_scoped_release>());

  // Pairs are (vertical, horizontal).
  m.def(
      "convolve",
      [](const std::string& precision, Address x, bool x_shared, Address weight, bool channels_last, Address y,
         int64_t images, int channels, int outputs, std::array<int, 2> size, std::array<int, 2> kernel,
         std::array<int, 2> stride, std::array<int, 2> padding, std::array<int, 2> dilation, int groups, Address shift,
         Address seed, Address samples, int64_t sample_count, const Noise& noise, bool backward, int device,
         Address stream) {
        cuda::LayerRun run = {};
        run.type = type_named(precision);
        run.x = at<void>(x);
        run.x_shared = x_shared;
        run.weight = at<float>(weight);
        run.channels_last = channels_last;
        run.y = at<void>(y);
        run.images = images;
        run.channels = channels, run.outputs = outputs;
        run.in_h = size[0], run.in_w = size[1];
        run.kernel_h = kernel[0], run.kernel_w = kernel[1];
        run.stride_h = stride[0], run.stride_w = stride[1];
        run.padding_h = padding[0], run.padding_w = padding[1];
        run.dilation_h = dilation[0], run.dilation_w = dilation[1];
        run.groups = groups;
        run.shift = at<float>(shift);
        run.chips = chips(seed, samples, sample_count);
        run.noise = noise;
        run.backward = backward;
        run.device = device;
        run.stream = at<void>(stream);
        py::gil_scoped_release unlocked;
        cuda::convolve(run);
      },
      py::kw_only(), py::arg("precision"), py::arg("x"), py::arg("x_shared"), py::arg("weight"),
      py::arg("channels_last"), py::arg("y"), py::arg("images"), py::arg("channels"), py::arg("outputs"),
      py::arg("size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
      py::arg("shift") = 0, py::arg("seed"), py::arg("samples"), py::arg("sample_count"), py::arg("noise"),
      py::arg("backward") = false, py::arg("device"), py::arg("cuda_stream") = 0);
}
