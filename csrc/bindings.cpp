// Unpack, release the GIL, call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "depthwise_conv.h"
#include "dispatch.h"
#include "network.h"
#include "parallel.h"
#include "peak.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::string isa_or_selected(const char* isa) { return isa != nullptr ? isa : effnet::selected_isa(); }

using Sides = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

effnet::Padding padding_of(const Sides& sides) {
  const auto [left, right, top, bottom] = sides;
  return {false, left, right, top, bottom};
}

// Addresses are tensors' data_ptr(), 0 for one that is absent.
void depthwise_conv(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t shift,
                    std::uintptr_t y, std::uintptr_t pooled, std::int64_t batch, std::int64_t channels,
                    std::int64_t height, std::int64_t width, std::int64_t out_height, std::int64_t out_width,
                    int kernel, std::int64_t stride, const Sides& padding, int act, int threads, const char* isa) {
  effnet::DepthwiseCall call;
  call.x = pointer<const float>(x);
  call.weight = pointer<const float>(weight);
  call.scale = pointer<const float>(scale);
  call.shift = pointer<const float>(shift);
  call.y = pointer<float>(y);
  call.pooled = pointer<float>(pooled);
  call.batch = batch;
  call.channels = channels;
  call.height = height;
  call.width = width;
  call.out_height = out_height;
  call.out_width = out_width;
  call.kernel = kernel;
  call.stride = stride;
  call.padding = padding_of(padding);
  call.act = static_cast<effnet::Activation>(act);
  const std::string name = isa_or_selected(isa);
  py::gil_scoped_release unlocked;
  effnet::depthwise_conv(call, name, threads);
}

effnet::LayerSpec layer_spec(const py::dict& given) {
  const auto number = [&](const char* key) { return given[key].cast<std::int64_t>(); };
  const auto address = [&](const char* key) { return pointer<const float>(given[key].cast<std::uintptr_t>()); };
  effnet::LayerSpec spec;
  spec.kind = given["depthwise"].cast<bool>() ? effnet::LayerKind::depthwise : effnet::LayerKind::conv;
  spec.in_channels = number("in_channels");
  spec.out_channels = number("out_channels");
  spec.kernel = number("kernel");
  spec.stride = number("stride");
  if (given["padding"].is_none()) {
    spec.padding.same = true;
  } else {
    spec.padding = padding_of(given["padding"].cast<Sides>());
  }
  spec.act = static_cast<effnet::Activation>(number("act"));
  spec.residual = number("residual");
  spec.pool = given["pool"].cast<bool>();
  spec.weight = address("weight");
  spec.bias = address("bias");
  spec.excitation.squeeze = number("squeeze");
  if (spec.excitation.squeeze > 0) {
    spec.excitation.act = static_cast<effnet::Activation>(number("squeeze_act"));
    spec.excitation.gate = static_cast<effnet::Gate>(number("gate"));
    spec.excitation.w1 = address("w1");
    spec.excitation.b1 = address("b1");
    spec.excitation.w2 = address("w2");
    spec.excitation.b2 = address("b2");
  }
  return spec;
}

std::unique_ptr<effnet::Network> make_network(const py::list& given, std::vector<std::int64_t> outputs) {
  std::vector<effnet::Layer> layers;
  for (const auto& layer : given) layers.push_back(effnet::pack(layer_spec(layer.cast<py::dict>())));
  return std::make_unique<effnet::Network>(std::move(layers), std::move(outputs));
}

// The address of a tensor and its strides of image, channel, row and pixel, in floats.
using Tensor = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

effnet::View view_of(const Tensor& tensor) {
  const auto [address, image, channel, row, pixel] = tensor;
  return {pointer<float>(address), image, channel, row, pixel};
}

py::object run_network(const effnet::Network& network, const Tensor& image, std::int64_t batch, std::int64_t height,
                       std::int64_t width, const std::vector<Tensor>& outputs, int threads, bool profiled,
                       const char* isa) {
  std::vector<effnet::View> views;
  for (const Tensor& output : outputs) views.push_back(view_of(output));
  const std::string name = isa_or_selected(isa);
  std::vector<effnet::StepProfile> profile;
  {
    py::gil_scoped_release unlocked;
    network.run(view_of(image), batch, height, width, views, name, threads, profiled ? &profile : nullptr);
  }
  if (!profiled) return py::none();
  py::list steps;
  for (const effnet::StepProfile& step : profile) {
    steps.append(py::make_tuple(step.name, step.multiply_adds, step.seconds));
  }
  return steps;
}

py::list output_sizes(const effnet::Network& network, std::int64_t height, std::int64_t width) {
  py::list sizes;
  for (const effnet::MapSize& size : network.output_sizes(height, width)) {
    sizes.append(py::make_tuple(size.channels, size.height, size.width));
  }
  return sizes;
}

void unpack_layer(const effnet::Network& network, std::size_t index, std::uintptr_t weight, std::uintptr_t bias,
                  std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2) {
  network.layers().at(index).unpack(pointer<float>(weight), pointer<float>(bias), pointer<float>(w1),
                                    pointer<float>(b1), pointer<float>(w2), pointer<float>(b2));
}

double fma_peak(int threads, const char* isa) {
  const std::string name = isa_or_selected(isa);
  py::gil_scoped_release unlocked;
  return effnet::fma_peak(name, threads);
}

py::list kernels() {
  py::list rows;
  for (const effnet::Kernels* kernels : effnet::kernel_table()) {
    py::dict entry;
    entry["isa"] = kernels->isa;
    entry["lanes"] = kernels->lanes;
    entry["emulated"] = kernels->emulated;
    entry["supported"] = effnet::isa_supported(kernels->isa);
    rows.append(entry);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native CPU kernels; effnet_kernels.cpu checks the arguments.";
  m.def("depthwise_conv", &depthwise_conv, py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("shift"),
        py::arg("y"), py::arg("pooled"), py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
        py::arg("out_height"), py::arg("out_width"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("act"), py::arg("threads"), py::arg("isa") = py::none());
  py::class_<effnet::Network>(m, "Network")
      .def(py::init(&make_network), py::arg("layers"), py::arg("outputs"))
      .def("run", &run_network, py::arg("image"), py::arg("batch"), py::arg("height"), py::arg("width"),
           py::arg("outputs"), py::arg("threads"), py::arg("profiled") = false, py::arg("isa") = py::none())
      .def("output_sizes", &output_sizes, py::arg("height"), py::arg("width"))
      .def("unpack_layer", &unpack_layer, "Writes a layer's weights back to memory of the shapes they came in.");
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("isa") = py::none(),
        "Measured floating-point operations a second of multiply-adds in registers.");
  m.def("kernels", &kernels, "The instruction sets of the table of kernels.");
  m.def("supported_isas", &effnet::supported_isas);
  m.def("selected_isa", &effnet::selected_isa);
  m.def("thread_runtime", &effnet::thread_runtime);
}
