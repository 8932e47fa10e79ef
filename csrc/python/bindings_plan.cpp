// correctnet._native.Plan: a network on many chip samples (plan/plan.h). Arrays are numpy arrays; plans are built by
// correctnet/engine/lowering.py and correctnet/crossbar/kernels.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/bindings_plan.h"

namespace py = pybind11;
using namespace correctnet;

namespace {

using Pair = std::array<int, 2>;

std::vector<float> values(const Floats& array) { return {array.data(), array.data() + array.size()}; }

Activation activation_named(const std::string& text) {
  for (int i = 0; i <= int(Activation::hardswish); ++i)
    if (text == name(Activation(i))) return Activation(i);
  fail("activation: there is no '" + text + "'");
}

Pointwise pointwise(const std::optional<Floats>& scale, const std::optional<Floats>& shift,
                    const std::string& activation, const std::optional<Floats>& after_scale,
                    const std::optional<Floats>& after_shift, float low, float high,
                    const std::optional<std::array<float, 2>>& adc, const std::optional<std::array<float, 2>>& dac) {
  const auto converter = [](const auto& c) { return c ? Converter{(*c)[0], (*c)[1]} : Converter{}; };
  const auto get = [](const std::optional<Floats>& array) { return array ? values(*array) : std::vector<float>{}; };
  return {get(scale), get(shift), activation_named(activation), get(after_scale), get(after_shift), low, high,
          converter(adc), converter(dac)};
}

}  // namespace

void bind_plan(py::module_& m) {
  constexpr size_t kKeepBytes = 64 << 20;

  py::class_<Pointwise>(m, "Pointwise")
      .def(py::init(&pointwise), py::kw_only(), py::arg("scale") = py::none(), py::arg("shift") = py::none(),
           py::arg("activation") = "none", py::arg("after_scale") = py::none(), py::arg("after_shift") = py::none(),
           py::arg("low") = 0.0f, py::arg("high") = 0.0f, py::arg("adc") = py::none(), py::arg("dac") = py::none());

  py::class_<BoundPlan>(m, "Plan")
      .def(py::init([](const std::string& precision, int channels, int height, int width) {
             return std::make_unique<BoundPlan>(precision, Shape{channels, height, width});
           }),
           py::arg("precision"), py::arg("channels"), py::arg("height"), py::arg("width"))
      .def_readonly("precision", &BoundPlan::precision)
      .def_readonly("isa", &BoundPlan::isa)
      .def("shape",
           [](const BoundPlan& p, int value) {
             const Shape s = p.plan.shape(value);
             return std::make_tuple(s.channels, s.height, s.width);
           })
      .def(
          "conv",
          [](BoundPlan& p, int x, const Floats& weight, Pair stride, Pair padding, Pair dilation, int groups,
             const std::optional<Noise>& noise, const Pointwise& pointwise, bool pool, const std::optional<Floats>& spread,
             const std::optional<Floats>& reach) {
            if (weight.ndim() != 4) fail("weight: (outputs, kernel_h, kernel_w, channels / groups) is expected");
            Conv conv;
            conv.outputs = int(weight.shape(0));
            conv.kernel_h = int(weight.shape(1));
            conv.kernel_w = int(weight.shape(2));
            conv.stride_h = stride[0], conv.stride_w = stride[1];
            conv.padding_h = padding[0], conv.padding_w = padding[1];
            conv.dilation_h = dilation[0], conv.dilation_w = dilation[1];
            conv.groups = groups;
            conv.weight = values(weight);
            conv.noise = noise;
            conv.pointwise = pointwise;
            conv.pool = pool;
            if (spread) conv.spread = values(*spread);
            if (reach) conv.reach = values(*reach);
            return p.plan.conv(x, conv);
          },
          py::arg("x"), py::arg("weight"), py::kw_only(), py::arg("stride") = Pair{1, 1},
          py::arg("padding") = Pair{0, 0}, py::arg("dilation") = Pair{1, 1}, py::arg("groups") = 1,
          py::arg("noise") = py::none(), py::arg("pointwise") = Pointwise{}, py::arg("pool") = false,
          py::arg("spread") = py::none(), py::arg("reach") = py::none())
      .def(
          "linear",
          [](BoundPlan& p, int x, const Floats& weight, const std::optional<Noise>& noise,
             const Pointwise& pointwise, const std::optional<Floats>& spread, const std::optional<Floats>& reach) {
            if (weight.ndim() != 2) fail("weight: (outputs, inputs) is expected");
            const auto get = [](const std::optional<Floats>& a) { return a ? values(*a) : std::vector<float>{}; };
            return p.plan.linear(x, {int(weight.shape(0)), values(weight), noise, pointwise, get(spread), get(reach)});
          },
          py::arg("x"), py::arg("weight"), py::kw_only(), py::arg("noise") = py::none(),
          py::arg("pointwise") = Pointwise{}, py::arg("spread") = py::none(), py::arg("reach") = py::none())
      .def("flatten", [](BoundPlan& p, int x) { return p.plan.flatten(x); })
      .def(
          "max_pool",
          [](BoundPlan& p, int x, Pair kernel, Pair stride, Pair padding, bool ceil, bool include_padding) {
            return p.plan.max_pool(
                x, {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], ceil, include_padding});
          },
          py::arg("x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("ceil") = false,
          py::arg("include_padding") = true)
      .def(
          "average_pool",
          [](BoundPlan& p, int x, Pair kernel, Pair stride, Pair padding, bool ceil, bool include_padding) {
            return p.plan.average_pool(
                x, {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], ceil, include_padding});
          },
          py::arg("x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("ceil") = false,
          py::arg("include_padding") = true)
      .def("adaptive_average_pool",
           [](BoundPlan& p, int x, int height, int width) { return p.plan.adaptive_average_pool(x, height, width); })
      .def("concat", [](BoundPlan& p, const std::vector<int>& parts) { return p.plan.concat(parts); })
      .def("channels", [](BoundPlan& p, int x, const std::vector<int>& order) { return p.plan.channels(x, order); })
      .def("pixels", [](BoundPlan& p, int x, const std::vector<int>& rows,
                        const std::vector<int>& cols) { return p.plan.pixels(x, rows, cols); })
      .def("pointwise", [](BoundPlan& p, int x, const Pointwise& f) { return p.plan.pointwise(x, f); })
      .def("add", [](BoundPlan& p, int a, int b, const Pointwise& f) { return p.plan.add(a, b, f); })
      .def("multiply", [](BoundPlan& p, int a, int b, const Pointwise& f) { return p.plan.multiply(a, b, f); })
      .def("layer_norm",
           [](BoundPlan& p, int x, float eps, const Pointwise& f) { return p.plan.layer_norm(x, eps, f); })
      .def("group_norm", [](BoundPlan& p, int x, int groups, float eps,
                            const Pointwise& f) { return p.plan.group_norm(x, groups, eps, f); })
      .def(
          "attention",
          [](BoundPlan& p, int q, int k, int v, int heads, int width, std::array<int, 3> first, float scale,
             const std::vector<int>& tokens, int length, const std::optional<Floats>& bias,
             const std::optional<Floats>& mask) {
            Attention a;
            a.heads = heads, a.width = width, a.scale = scale, a.tokens = tokens, a.length = length;
            std::copy(first.begin(), first.end(), a.first);
            if (bias) a.bias = values(*bias);
            if (mask) a.mask = values(*mask);
            return p.plan.attention(q, k, v, a);
          },
          py::arg("q"), py::arg("k"), py::arg("v"), py::kw_only(), py::arg("heads"), py::arg("width"), py::arg("first"),
          py::arg("scale"), py::arg("tokens"), py::arg("length"), py::arg("bias") = py::none(),
          py::arg("mask") = py::none())
      .def(
          "gather",
          [](BoundPlan& p, int x, int height, int width, const std::vector<int>& from,
             const std::optional<Floats>& constant) {
            return p.plan.gather(x, height, width, from, constant ? values(*constant) : std::vector<float>{});
          },
          py::arg("x"), py::arg("height"), py::arg("width"), py::arg("source"), py::arg("constant") = py::none())
      .def("finish",
           [](BoundPlan& p, int output) {
             p.plan.finish(output);
             p.output = output;
           })
      // (FLOP an image once, FLOP an image on every chip, noisy weights of a chip)
      .def("cost",
           [](const BoundPlan& p) {
             const Cost cost = p.plan.cost();
             return std::make_tuple(cost.shared, cost.sampled, cost.weights);
           })
      .def(
          "bytes",
          [](const BoundPlan& p, int64_t count, int64_t samples, int threads, size_t keep_bytes) {
            if (samples < 0) fail("samples: at least 0");
            const std::vector<uint32_t> chips(samples);
            return p.plan.bytes(p.run(count, chips, threads, keep_bytes));
          },
          py::arg("count"), py::arg("samples"), py::kw_only(), py::arg("threads") = 1,
          py::arg("keep_bytes") = kKeepBytes)
      // Of each sample: the images that are classified correctly; how many weights were drawn, of all samples; and, of
      // each, the images with an output that is NaN or infinite.
      .def(
          "count_correct",
          [](const BoundPlan& p, const Images& images, const Labels& labels, uint64_t seed,
             const std::vector<uint32_t>& samples, int threads, size_t keep_bytes, bool images_last) {
            p.check_images(images, images_last);
            if (labels.ndim() != 1 || labels.shape(0) != images.shape(0)) fail("labels: one an image is expected");
            Labels correct(py::ssize_t(samples.size())), nonfinite(py::ssize_t(samples.size()));
            int64_t drawn = 0;
            Run run = p.run(images.shape(0), samples, threads, keep_bytes);
            run.images = images.data();
            run.seed = seed;
            run.images_last = images_last;
            run.labels = labels.data();
            run.correct = correct.mutable_data();
            run.nonfinite = nonfinite.mutable_data();
            run.drawn = &drawn;
            {
              py::gil_scoped_release unlocked;
              p.plan.run(run);
            }
            return std::make_tuple(correct, drawn, nonfinite);
          },
          py::arg("images"), py::arg("labels"), py::kw_only(), py::arg("seed"), py::arg("samples"),
          py::arg("threads") = 1, py::arg("keep_bytes") = kKeepBytes, py::arg("images_last") = false)
      // The outputs, (samples, images, channels, height, width) or with the channels last, and how many weights were
      // drawn.
      .def(
          "outputs",
          [](const BoundPlan& p, const Images& images, uint64_t seed, const std::vector<uint32_t>& samples, int threads,
             size_t keep_bytes, bool images_last, bool outputs_last) {
            p.check_images(images, images_last);
            if (p.output < 0) fail("run: the plan is not finished");
            const Shape s = p.plan.shape(p.output);
            const py::ssize_t channels = s.channels, height = s.height, width = s.width, count = images.shape(0);
            const py::ssize_t chips = py::ssize_t(samples.size());
            Images out = outputs_last ? Images({chips, count, height, width, channels})
                                      : Images({chips, count, channels, height, width});
            int64_t drawn = 0;
            Run run = p.run(images.shape(0), samples, threads, keep_bytes);
            run.images = images.data();
            run.seed = seed;
            run.outputs = out.mutable_data();
            run.images_last = images_last;
            run.outputs_last = outputs_last;
            run.drawn = &drawn;
            {
              py::gil_scoped_release unlocked;
              p.plan.run(run);
            }
            return std::make_tuple(out, drawn);
          },
          py::arg("images"), py::kw_only(), py::arg("seed"), py::arg("samples"), py::arg("threads") = 1,
          py::arg("keep_bytes") = kKeepBytes, py::arg("images_last") = false, py::arg("outputs_last") = false);

  // The floating-point operations of `repetitions` rounds of multiply-adds in registers, on this thread (peak.h).
  m.def(
      "peak",
      [](const std::string& precision, int64_t repetitions) {
        if (repetitions < 1) fail("peak: repetitions must be at least 1");
        return kernels(selected_isa()).type[int(type_named(precision))].peak(repetitions);
      },
      py::arg("precision"), py::arg("repetitions"), py::call_guard<py::gil_scoped_release>());
}
