// The only file that knows Python: it unpacks arguments, releases the interpreter's lock and calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "engine/network.h"
#include "gpu/launches.h"
#include "kernels/dispatch.h"
#include "kernels/peak.h"
#include "operators/fingerprint.h"
#include "operators/operators.h"
#include "platform/parallel.h"
#include "platform/pool.h"

namespace py = pybind11;

namespace {

// Must equal INTERFACE in effnet_kernels/backends/cpu/extension.py, and is raised in both places where a function is
// new or takes other arguments, or an enum in kernels.h gets a value.
constexpr int interface_version = 8;

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

// Calls an operator without the interpreter's lock.
template <class Operator, class... Arguments>
void unlocked(int threads, const char* isa, const Operator& call, const Arguments&... arguments) {
  const effnet::Execution execution{effnet::kernels_of(isa_or_selected(isa)), threads};
  const py::gil_scoped_release released;
  call(arguments..., execution);
}

// The structs of operators.h as tuples. An address is a tensor's data_ptr(), or 0 where there is no tensor.
using PixelsTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using PrologueTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, int>;
using EpilogueTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, int>;
using GradientTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                                 std::uintptr_t, std::uintptr_t, std::uintptr_t, int>;

effnet::Pixels pixels_of(const PixelsTuple& given) {
  const auto [images, pixels, groups, shards] = given;
  return {images, pixels, groups, shards};
}

effnet::Prologue prologue_of(const PrologueTuple& given) {
  const auto [scale, shift, gate, act] = given;
  return {pointer<const float>(scale), pointer<const float>(shift), pointer<const float>(gate),
          static_cast<effnet::Activation>(act)};
}

effnet::Epilogue epilogue_of(const EpilogueTuple& given) {
  const auto [scale, shift, residual, act] = given;
  return {pointer<const float>(scale), pointer<const float>(shift), pointer<const float>(residual),
          static_cast<effnet::Activation>(act)};
}

effnet::OutputGradient gradient_of(const GradientTuple& given) {
  const auto [grad, y, coefficients, gate, drop_path_scale, offset, scale, shift, act] = given;
  return {pointer<const float>(grad),
          pointer<const float>(y),
          pointer<const float>(coefficients),
          pointer<const float>(gate),
          pointer<const float>(drop_path_scale),
          pointer<const float>(offset),
          pointer<const float>(scale),
          pointer<const float>(shift),
          static_cast<effnet::Activation>(act)};
}

PixelsTuple partition_pixels(std::int64_t images, std::int64_t pixels, bool by_image) {
  const effnet::Pixels result = effnet::partition_pixels(images, pixels, by_image);
  return {result.images, result.pixels, result.groups, result.shards};
}

void pointwise_forward(const PixelsTuple& pixels, std::int64_t channels, std::int64_t outputs, std::uintptr_t x,
                       std::uintptr_t weight, std::uintptr_t bias, const PrologueTuple& prologue,
                       const EpilogueTuple& epilogue, int reduction, std::uintptr_t y, std::uintptr_t partials,
                       int threads, const char* isa) {
  const effnet::PointwiseForward call{pixels_of(pixels),
                                      channels,
                                      outputs,
                                      pointer<const float>(x),
                                      pointer<const float>(weight),
                                      pointer<const float>(bias),
                                      prologue_of(prologue),
                                      epilogue_of(epilogue),
                                      static_cast<effnet::Reduction>(reduction),
                                      pointer<float>(y),
                                      pointer<float>(partials)};
  unlocked(threads, isa, effnet::pointwise_forward, call);
}

void pointwise_backward(const PixelsTuple& pixels, std::int64_t channels, std::int64_t outputs,
                        const GradientTuple& gradient, std::uintptr_t weight, std::uintptr_t x,
                        const PrologueTuple& prologue, std::uintptr_t mean, std::uintptr_t residual,
                        bool apply_act_grad, std::uintptr_t dx, std::uintptr_t sums, std::uintptr_t dweight,
                        int threads, const char* isa) {
  const effnet::PointwiseBackward call{pixels_of(pixels),
                                       channels,
                                       outputs,
                                       gradient_of(gradient),
                                       pointer<const float>(weight),
                                       pointer<const float>(x),
                                       prologue_of(prologue),
                                       pointer<const float>(mean),
                                       pointer<const float>(residual),
                                       apply_act_grad,
                                       pointer<float>(dx),
                                       pointer<float>(sums),
                                       pointer<float>(dweight)};
  unlocked(threads, isa, effnet::pointwise_backward, call);
}

// images, channels, height, width, out_height, out_width, kernel, stride, left, top
using ShapeTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                              std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

std::int64_t images_of(const ShapeTuple& given) { return std::get<0>(given); }

effnet::ConvShape shape_of(const ShapeTuple& given) {
  const auto [images, channels, height, width, out_height, out_width, kernel, stride, left, top] = given;
  return {channels, height, width, out_height, out_width, kernel, stride, left, top};
}

void depthwise_forward(const ShapeTuple& shape, std::uintptr_t x, std::uintptr_t weight, const PrologueTuple& prologue,
                       const EpilogueTuple& epilogue, int reduction, std::uintptr_t y, std::uintptr_t partials,
                       int threads, const char* isa) {
  const effnet::DepthwiseForward call{images_of(shape),
                                      shape_of(shape),
                                      pointer<const float>(x),
                                      pointer<const float>(weight),
                                      prologue_of(prologue),
                                      epilogue_of(epilogue),
                                      static_cast<effnet::Reduction>(reduction),
                                      pointer<float>(y),
                                      pointer<float>(partials)};
  unlocked(threads, isa, effnet::depthwise_forward, call);
}

void depthwise_backward(const ShapeTuple& shape, const GradientTuple& gradient, std::uintptr_t x, std::uintptr_t weight,
                        const PrologueTuple& prologue, std::uintptr_t mean, std::uintptr_t residual, std::uintptr_t dz,
                        std::uintptr_t sums, std::uintptr_t dweight, int threads, const char* isa) {
  const effnet::DepthwiseBackward call{images_of(shape),
                                       shape_of(shape),
                                       gradient_of(gradient),
                                       pointer<const float>(x),
                                       pointer<const float>(weight),
                                       prologue_of(prologue),
                                       pointer<const float>(mean),
                                       pointer<const float>(residual),
                                       pointer<float>(dz),
                                       pointer<float>(sums),
                                       pointer<float>(dweight)};
  unlocked(threads, isa, effnet::depthwise_backward, call);
}

void patches(const ShapeTuple& shape, std::uintptr_t x, std::uintptr_t to, int threads, const char* isa) {
  unlocked(threads, isa, effnet::patches, images_of(shape), shape_of(shape), pointer<const float>(x),
           pointer<float>(to));
}

void bn_act_add(const PixelsTuple& pixels, std::int64_t channels, std::uintptr_t x, const PrologueTuple& prologue,
                std::uintptr_t drop_path_scale, std::uintptr_t residual, std::uintptr_t to, int threads,
                const char* isa) {
  unlocked(threads, isa, effnet::bn_act_add, pixels_of(pixels), channels, pointer<const float>(x),
           prologue_of(prologue), pointer<const float>(drop_path_scale), pointer<const float>(residual),
           pointer<float>(to));
}

void pooled_sums(const PixelsTuple& pixels, std::int64_t channels, std::uintptr_t x, const PrologueTuple& prologue,
                 std::uintptr_t factor, std::uintptr_t sums, int threads, const char* isa) {
  unlocked(threads, isa, effnet::pooled_sums, pixels_of(pixels), channels, pointer<const float>(x),
           prologue_of(prologue), pointer<const float>(factor), pointer<float>(sums));
}

// images, channels, squeezed
using ExciteTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

effnet::ExciteShape excite_shape_of(const ExciteTuple& given) {
  const auto [images, channels, squeezed] = given;
  return {images, channels, squeezed};
}

void excite(const ExciteTuple& shape, std::int64_t parts, std::int64_t pixels, std::uintptr_t sums, std::uintptr_t w1,
            std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2, int act, int kind, std::uintptr_t gate,
            std::uintptr_t pooled, std::uintptr_t hidden, int threads, const char* isa) {
  const effnet::Excite call{excite_shape_of(shape),
                            parts,
                            1.0f / static_cast<float>(pixels),
                            pointer<const float>(sums),
                            pointer<const float>(w1),
                            pointer<const float>(b1),
                            pointer<const float>(w2),
                            pointer<const float>(b2),
                            static_cast<effnet::Activation>(act),
                            static_cast<effnet::Gate>(kind),
                            pointer<float>(gate),
                            pointer<float>(pooled),
                            pointer<float>(hidden)};
  unlocked(threads, isa, effnet::excite, call);
}

void excite_backward(const ExciteTuple& shape, std::int64_t parts, std::int64_t kinds, std::int64_t pixels,
                     std::uintptr_t sums, std::uintptr_t gate, std::uintptr_t hidden, std::uintptr_t w1,
                     std::uintptr_t w2, int act, int kind, std::uintptr_t offset, std::uintptr_t grad_logits,
                     std::uintptr_t grad_hidden, std::uintptr_t norm_sums, int threads, const char* isa) {
  const effnet::ExciteBackward call{excite_shape_of(shape),
                                    parts,
                                    kinds,
                                    1.0f / static_cast<float>(pixels),
                                    pointer<const float>(sums),
                                    pointer<const float>(gate),
                                    pointer<const float>(hidden),
                                    pointer<const float>(w1),
                                    pointer<const float>(w2),
                                    static_cast<effnet::Activation>(act),
                                    static_cast<effnet::Gate>(kind),
                                    pointer<float>(offset),
                                    pointer<float>(grad_logits),
                                    pointer<float>(grad_hidden),
                                    pointer<float>(norm_sums)};
  unlocked(threads, isa, effnet::excite_backward, call);
}

void excite_backward_weight(const ExciteTuple& shape, std::uintptr_t grad_logits, std::uintptr_t grad_hidden,
                            std::uintptr_t hidden, std::uintptr_t pooled, int act, std::uintptr_t dw1,
                            std::uintptr_t db1, std::uintptr_t dw2, std::uintptr_t db2, int threads, const char* isa) {
  const effnet::ExciteBackwardWeight call{excite_shape_of(shape),
                                          pointer<const float>(grad_logits),
                                          pointer<const float>(grad_hidden),
                                          pointer<const float>(hidden),
                                          pointer<const float>(pooled),
                                          static_cast<effnet::Activation>(act),
                                          pointer<float>(dw1),
                                          pointer<float>(db1),
                                          pointer<float>(dw2),
                                          pointer<float>(db2)};
  unlocked(threads, isa, effnet::excite_backward_weight, call);
}

void channel_statistics(const PixelsTuple& pixels, std::int64_t channels, std::uintptr_t y, std::uintptr_t partials,
                        int threads, const char* isa) {
  unlocked(threads, isa, effnet::channel_statistics, pixels_of(pixels), channels, pointer<const float>(y),
           pointer<float>(partials));
}

void gradient_sums(const PixelsTuple& pixels, std::int64_t channels, const GradientTuple& gradient, std::uintptr_t mean,
                   std::uintptr_t sums, int threads, const char* isa) {
  unlocked(threads, isa, effnet::gradient_sums, pixels_of(pixels), channels, gradient_of(gradient),
           pointer<const float>(mean), pointer<float>(sums));
}

void apply_gradient(const PixelsTuple& pixels, std::int64_t channels, const GradientTuple& gradient,
                    std::uintptr_t residual, std::uintptr_t to, int threads, const char* isa) {
  unlocked(threads, isa, effnet::apply_gradient, pixels_of(pixels), channels, gradient_of(gradient),
           pointer<const float>(residual), pointer<float>(to));
}

void merge_statistics(std::uintptr_t partials, std::int64_t count, std::int64_t channels, std::uintptr_t stats) {
  effnet::merge_statistics(pointer<const float>(partials), count, channels, pointer<float>(stats));
}

void finalize_batch_norm(std::uintptr_t partials, std::int64_t count, std::int64_t channels, std::uintptr_t weight,
                         std::uintptr_t bias, std::uintptr_t running_mean, std::uintptr_t running_var, float momentum,
                         float eps, bool skip_nonfinite, std::uintptr_t folded) {
  effnet::finalize_batch_norm({pointer<const float>(partials), count, channels, pointer<const float>(weight),
                               pointer<const float>(bias), pointer<float>(running_mean), pointer<float>(running_var),
                               momentum, eps, skip_nonfinite, pointer<float>(folded)});
}

void finalize_batch_norm_backward(std::uintptr_t sums, std::int64_t count, std::int64_t partial_stride,
                                  std::int64_t kind_stride, std::int64_t channels, std::int64_t pixels,
                                  std::uintptr_t weight, std::uintptr_t mean, std::uintptr_t rstd,
                                  bool batch_statistics, std::uintptr_t coefficients, std::uintptr_t dweight,
                                  std::uintptr_t dbias) {
  effnet::finalize_batch_norm_backward({pointer<const float>(sums), count, partial_stride, kind_stride, channels,
                                        1.0f / static_cast<float>(pixels), pointer<const float>(weight),
                                        pointer<const float>(mean), pointer<const float>(rstd), batch_statistics,
                                        pointer<float>(coefficients), pointer<float>(dweight), pointer<float>(dbias)});
}

// Memory from the pool, which Python reads through the buffer protocol.
struct PooledBytes {
  effnet::Block block;
  std::size_t bytes;
};

effnet::Type type_of(bool bf16) { return bf16 ? effnet::Type::bf16 : effnet::Type::f32; }

effnet::LayerSpec layer_spec(const py::dict& given, effnet::Type of_weights) {
  const auto number = [&](const char* key) { return given[key].cast<std::int64_t>(); };
  const auto address = [&](const char* key) { return pointer<const float>(given[key].cast<std::uintptr_t>()); };
  const auto weights = [&](const char* key) { return effnet::Weights{address(key), of_weights}; };
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
  spec.weight = weights("weight");
  spec.weight.scale = pointer<const double>(given["scale"].cast<std::uintptr_t>());
  spec.bias = address("bias");
  spec.winograd = given["winograd"].cast<bool>();
  spec.excitation.squeeze = number("squeeze");
  if (spec.excitation.squeeze > 0) {
    spec.excitation.act = static_cast<effnet::Activation>(number("squeeze_act"));
    spec.excitation.gate = static_cast<effnet::Gate>(number("gate"));
    spec.excitation.w1 = weights("w1");
    spec.excitation.b1 = address("b1");
    spec.excitation.w2 = weights("w2");
    spec.excitation.b2 = address("b2");
  }
  return spec;
}

std::unique_ptr<effnet::Network> make_network(const py::list& given, std::vector<std::int64_t> outputs, bool bf16,
                                              bool bf16_weights) {
  const effnet::Type type = type_of(bf16);
  std::vector<effnet::Layer> layers;
  for (const auto& layer : given) {
    layers.push_back(effnet::pack(layer_spec(layer.cast<py::dict>(), type_of(bf16_weights)), type));
  }
  return std::make_unique<effnet::Network>(std::move(layers), std::move(outputs), type);
}

// The address of a tensor and its strides of image, channel, row and pixel, in numbers.
using Tensor = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

effnet::View view_of(const Tensor& tensor, bool bf16) {
  const auto [address, image, channel, row, pixel] = tensor;
  return {pointer<void>(address), type_of(bf16), image, channel, row, pixel};
}

py::object run_network(const effnet::Network& network, const Tensor& image, std::int64_t batch, std::int64_t height,
                       std::int64_t width, const std::vector<Tensor>& outputs, bool bf16, int threads, bool profiled,
                       const char* isa) {
  std::vector<effnet::View> views;
  for (const Tensor& output : outputs) views.push_back(view_of(output, bf16));
  const std::string name = isa_or_selected(isa);
  std::vector<effnet::StepProfile> profile;
  {
    py::gil_scoped_release unlocked;
    network.run(view_of(image, bf16), batch, height, width, views, name, threads, profiled ? &profile : nullptr);
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

std::uint64_t fingerprint_of(const std::vector<std::tuple<std::uintptr_t, std::int64_t>>& memory, int threads,
                             const char* isa) {
  std::vector<effnet::Bytes> parts;
  for (const auto& [address, bytes] : memory) parts.push_back({pointer<const void>(address), bytes});
  const effnet::Execution execution{effnet::kernels_of(isa_or_selected(isa)), threads};
  const py::gil_scoped_release unlocked;
  return effnet::fingerprint(parts, execution);
}

// Name, function, the grid's three sizes, threads of a block, bytes of shared memory, and parameters as pairs of a base
// and a value.
using LaunchTuple = std::tuple<std::string, std::uintptr_t, std::tuple<unsigned, unsigned, unsigned>, unsigned,
                               unsigned, std::vector<std::pair<int, std::uint64_t>>>;

// The addresses of a Driver's functions, in its order.
using DriverTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

effnet::Driver driver_of(const DriverTuple& given) {
  const auto [launch_kernel, get_current, set_current, retain] = given;
  return {reinterpret_cast<decltype(effnet::Driver::cuLaunchKernel)>(launch_kernel),
          reinterpret_cast<decltype(effnet::Driver::cuCtxGetCurrent)>(get_current),
          reinterpret_cast<decltype(effnet::Driver::cuCtxSetCurrent)>(set_current),
          reinterpret_cast<decltype(effnet::Driver::cuDevicePrimaryCtxRetain)>(retain)};
}

std::unique_ptr<effnet::Launches> make_launches(const DriverTuple& driver, int device,
                                                const std::vector<LaunchTuple>& given) {
  std::vector<effnet::Launch> launches;
  for (const auto& [name, function, grid, threads, shared_bytes, parameters] : given) {
    const auto [x, y, z] = grid;
    effnet::Launch launch{name, pointer<void>(function), x, y, z, threads, shared_bytes, {}};
    for (const auto& [base, value] : parameters) launch.parameters.push_back({base, value});
    launches.push_back(std::move(launch));
  }
  return std::make_unique<effnet::Launches>(driver_of(driver), device, std::move(launches));
}

void run_launches(const effnet::Launches& launches, std::uintptr_t stream,
                  const std::vector<std::uint64_t>& addresses) {
  const py::gil_scoped_release unlocked;
  launches.run(pointer<void>(stream), addresses);
}

double fma_peak(int threads, bool bf16, const char* isa) {
  const std::string name = isa_or_selected(isa);
  py::gil_scoped_release unlocked;
  return effnet::fma_peak(name, threads, bf16);
}

bool shared_with_earlier(const effnet::Kernels& kernels) {
  for (const effnet::Kernels* other : effnet::kernel_table()) {
    if (other == &kernels) break;
    if (other->f32.gemm_bias_act_residual_sum == kernels.f32.gemm_bias_act_residual_sum) return true;
  }
  return false;
}

py::list kernels() {
  py::list rows;
  for (const effnet::Kernels* kernels : effnet::kernel_table()) {
    py::dict entry;
    entry["isa"] = kernels->isa;
    entry["lanes"] = kernels->lanes;
    entry["emulated"] = kernels->emulated;
    entry["bf16"] = kernels->bf16 != nullptr;
    // Whether its kernels for float32 are another row's.
    entry["shares_f32"] = shared_with_earlier(*kernels);
    entry["supported"] = effnet::isa_supported(kernels->isa);
    rows.append(entry);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native CPU kernels, and launches on GPUs; effnet_kernels.backends checks the arguments.";
  m.attr("interface") = interface_version;
  // Initialises everything that is initialised on first use: if another thread were doing so during a fork, the child
  // would wait for it for ever.
  effnet::thread_runtime();
  effnet::release_plans();
  effnet::release_memory();
  try {
    effnet::selected_isa();
  } catch (const std::exception&) {
    // EFFNET_KERNELS_ISA is wrong, which the first call reports.
  }
  m.def("partition_pixels", &partition_pixels,
        "Divides pixels into shards: (images, pixels, groups, shards of a group).");
  m.def("depthwise_shards", &effnet::depthwise_shards);
  m.def("pointwise_forward", &pointwise_forward);
  m.def("pointwise_backward", &pointwise_backward);
  m.def("depthwise_forward", &depthwise_forward);
  m.def("depthwise_backward", &depthwise_backward);
  m.def("patches", &patches);
  m.def("bn_act_add", &bn_act_add);
  m.def("pooled_sums", &pooled_sums);
  m.def("excite", &excite);
  m.def("excite_backward", &excite_backward);
  m.def("excite_backward_weight", &excite_backward_weight);
  m.def("channel_statistics", &channel_statistics);
  m.def("gradient_sums", &gradient_sums);
  m.def("apply_gradient", &apply_gradient);
  m.def("merge_statistics", &merge_statistics);
  m.def("finalize_batch_norm", &finalize_batch_norm);
  m.def("finalize_batch_norm_backward", &finalize_batch_norm_backward);
  py::class_<PooledBytes>(m, "PooledBytes", py::buffer_protocol())
      .def(py::init([](std::size_t bytes) { return PooledBytes{effnet::acquire(bytes), bytes}; }))
      .def_buffer([](PooledBytes& pooled) {
        return py::buffer_info(pooled.block.get(), 1, py::format_descriptor<unsigned char>::format(), 1,
                               {static_cast<py::ssize_t>(pooled.bytes)}, {1});
      });
  m.def("release_memory", [] {
    effnet::release_plans();
    effnet::release_memory();
  });
  py::class_<effnet::Network>(m, "Network")
      .def(py::init(&make_network), py::arg("layers"), py::arg("outputs"), py::arg("bf16"), py::arg("bf16_weights"))
      .def("run", &run_network, py::arg("image"), py::arg("batch"), py::arg("height"), py::arg("width"),
           py::arg("outputs"), py::arg("bf16"), py::arg("threads"), py::arg("profiled") = false,
           py::arg("isa") = py::none())
      .def("output_sizes", &output_sizes, py::arg("height"), py::arg("width"));
  m.def("fingerprint", &fingerprint_of, py::arg("memory"), py::arg("threads"), py::arg("isa") = py::none(),
        "A hash of the bytes at these addresses.");
  py::class_<effnet::Launches>(m, "Launches")
      .def(py::init(&make_launches), py::arg("driver"), py::arg("device"), py::arg("launches"))
      .def("run", &run_launches, py::arg("stream"), py::arg("addresses"));
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("bf16") = false, py::arg("isa") = py::none(),
        "Measured floating-point operations a second of multiply-adds in registers.");
  m.def("kernels", &kernels, "The instruction sets of the table of kernels.");
  m.def("supported_isas", &effnet::supported_isas);
  m.def("selected_isa", &effnet::selected_isa);
  m.def("without_bf16", &effnet::without_bf16, "The error where an instruction set has no kernels for bfloat16.");
  m.def("thread_runtime", &effnet::thread_runtime);
}
