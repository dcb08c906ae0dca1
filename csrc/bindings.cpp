// Unpack, release the GIL, call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "depthwise_conv.h"
#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Addresses are tensors' data_ptr(), 0 for one that is absent.
void depthwise_conv(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t shift,
                    std::uintptr_t y, std::uintptr_t pooled, std::int64_t batch, std::int64_t channels,
                    std::int64_t height, std::int64_t width, std::int64_t out_height, std::int64_t out_width,
                    int kernel, std::int64_t stride, std::int64_t pad_left, std::int64_t pad_top, int act, int threads,
                    const char* isa) {
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
  call.pad_left = pad_left;
  call.pad_top = pad_top;
  call.act = static_cast<effnet::Activation>(act);
  const std::string name = isa != nullptr ? isa : effnet::selected_isa();
  py::gil_scoped_release unlocked;
  effnet::depthwise_conv(call, name, threads);
}

py::list kernels() {
  py::list rows;
  for (const effnet::KernelRow& row : effnet::kernel_table()) {
    py::dict entry;
    entry["op"] = row.op;
    entry["isa"] = row.isa;
    entry["lanes"] = row.lanes;
    entry["emulated"] = row.emulated;
    entry["supported"] = effnet::isa_supported(row.isa);
    rows.append(entry);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native CPU kernels; effnet_kernels.cpu checks the arguments.";
  m.def("depthwise_conv", &depthwise_conv, py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("shift"),
        py::arg("y"), py::arg("pooled"), py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
        py::arg("out_height"), py::arg("out_width"), py::arg("kernel"), py::arg("stride"), py::arg("pad_left"),
        py::arg("pad_top"), py::arg("act"), py::arg("threads"), py::arg("isa") = py::none());
  m.def("kernels", &kernels, "Rows of the table of kernels.");
  m.def("supported_isas", &effnet::supported_isas);
  m.def("selected_isa", &effnet::selected_isa);
  m.def("thread_runtime", &effnet::thread_runtime);
}
