// Runs every operator and a small network with the kernels of every instruction set that this machine supports, on
// memory that ends where the tensors end. It is built with sanitizers, which see accesses that a test from Python
// cannot. Values are compared with loops over doubles. A GPU's launches run, too, on a driver that is a function here.
#include "operators/operators.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "engine/network.h"
#include "gpu/launches.h"
#include "kernels/dispatch.h"

namespace {

using effnet::Activation;
using Vector = std::vector<float>;

std::mt19937 generator(0);

// A vector made with its final size allocates no more than that, so that the sanitizer sees an access past its end.
Vector random(std::int64_t count) {
  std::normal_distribution<float> normal;
  Vector values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

Vector empty(std::int64_t count) { return Vector(static_cast<std::size_t>(count), NAN); }

int failures = 0;

void expect_close(const char* isa, const char* what, const Vector& actual, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  // Not written with >, which would let a NaN pass.
  if (std::sqrt(error / size) < 1e-5) return;
  std::printf("%s: %s: relative error %g\n", isa, what, std::sqrt(error / size));
  ++failures;
}

void expect_finite(const char* isa, const char* what, const Vector& values) {
  for (const float value : values) {
    if (std::isfinite(value)) continue;
    std::printf("%s: %s: a value is not finite, perhaps uninitialised memory\n", isa, what);
    ++failures;
    return;
  }
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not true: %s\n", what);
  ++failures;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

struct Case {
  std::int64_t images, channels, outputs, height, width;
};

void pointwise(const effnet::Execution& execution, const Case& c) {
  const char* isa = execution.kernels.isa;
  const std::int64_t pixels = c.height * c.width, rows = c.images * pixels;
  const Vector x = random(rows * c.channels), weight = random(c.outputs * c.channels), bias = random(c.outputs);
  const Vector scale = random(c.channels), shift = random(c.channels), gate = random(c.images * c.channels);
  const effnet::Prologue prologue{scale.data(), shift.data(), gate.data(), Activation::silu};
  const effnet::Pixels partition = effnet::partition_pixels(c.images, pixels, true);
  Vector y = empty(rows * c.outputs), statistics = empty(partition.total_shards() * 3 * c.outputs);
  effnet::pointwise_forward({partition,
                             c.channels,
                             c.outputs,
                             x.data(),
                             weight.data(),
                             bias.data(),
                             prologue,
                             {},
                             effnet::Reduction::statistics,
                             y.data(),
                             statistics.data()},
                            execution);
  std::vector<double> activated(x.size()), expected(y.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t channel = i % c.channels, image = i / (pixels * c.channels);
    activated[i] = silu(double(scale[channel]) * x[i] + shift[channel]) * gate[image * c.channels + channel];
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t k = 0; k < c.outputs; ++k) {
      double sum = bias[k];
      for (std::int64_t i = 0; i < c.channels; ++i) sum += activated[row * c.channels + i] * weight[k * c.channels + i];
      expected[row * c.outputs + k] = sum;
    }
  }
  expect_close(isa, "pointwise forward", y, expected);
  expect_finite(isa, "pointwise statistics", statistics);

  const Vector grad = random(rows * c.outputs), mean = random(c.channels), keep = random(c.images);
  effnet::OutputGradient gradient{};
  gradient.grad = grad.data();
  gradient.y = y.data();
  Vector dx = empty(rows * c.channels), sums = empty(c.images * partition.shards * 5 * c.channels);
  Vector dweight = empty(c.outputs * c.channels);
  effnet::pointwise_backward({partition, c.channels, c.outputs, gradient, weight.data(), x.data(), prologue,
                              mean.data(), nullptr, false, dx.data(), sums.data(), dweight.data()},
                             execution);
  std::vector<double> of_x(dx.size()), of_weight(dweight.size());
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t k = 0; k < c.outputs; ++k) {
      for (std::int64_t i = 0; i < c.channels; ++i) {
        of_x[row * c.channels + i] += double(grad[row * c.outputs + k]) * weight[k * c.channels + i];
        of_weight[k * c.channels + i] += grad[row * c.outputs + k] * activated[row * c.channels + i];
      }
    }
  }
  expect_close(isa, "pointwise data gradient", dx, of_x);
  expect_close(isa, "pointwise weight gradient", dweight, of_weight);
  expect_finite(isa, "pointwise sums", sums);

  Vector merged = empty(rows * c.channels), squeezed = empty(partition.total_shards() * c.channels);
  Vector partials = empty(partition.total_shards() * 3 * c.channels),
         two = empty(partition.total_shards() * 2 * c.outputs);
  const Vector output_mean = random(c.outputs);
  effnet::bn_act_add(partition, c.channels, x.data(), prologue, keep.data(), x.data(), merged.data(), execution);
  effnet::pooled_sums(partition, c.channels, x.data(), prologue, x.data(), squeezed.data(), execution);
  effnet::channel_statistics(partition, c.channels, x.data(), partials.data(), execution);
  effnet::gradient_sums(partition, c.outputs, gradient, output_mean.data(), two.data(), execution);
  Vector applied = empty(rows * c.outputs);
  effnet::apply_gradient(partition, c.outputs, gradient, grad.data(), applied.data(), execution);
  for (const Vector* values : {&merged, &squeezed, &partials, &two, &applied}) expect_finite(isa, "passes", *values);
}

void depthwise(const effnet::Execution& execution, const Case& c, std::int64_t kernel, std::int64_t stride) {
  const char* isa = execution.kernels.isa;
  const std::int64_t pad = kernel / 2;
  const auto out = [&](std::int64_t size) { return (size + 2 * pad - kernel) / stride + 1; };
  const effnet::ConvShape shape{c.channels, c.height, c.width, out(c.height), out(c.width), kernel, stride, pad, pad};
  const std::int64_t taps = kernel * kernel;
  const Vector x = random(c.images * c.height * c.width * c.channels), weight = random(c.channels * taps);
  const Vector scale = random(c.channels), shift = random(c.channels);
  const effnet::Prologue prologue{scale.data(), shift.data(), nullptr, Activation::silu};
  Vector y = empty(c.images * shape.out_height * shape.out_width * c.channels);
  Vector statistics = empty(effnet::depthwise_shards(c.images) * 3 * c.channels);
  effnet::depthwise_forward({c.images,
                             shape,
                             x.data(),
                             weight.data(),
                             prologue,
                             {},
                             effnet::Reduction::statistics,
                             y.data(),
                             statistics.data()},
                            execution);
  const Vector grad = random(static_cast<std::int64_t>(y.size())), mean = random(c.channels);
  effnet::OutputGradient gradient{};
  gradient.grad = grad.data();
  Vector dz = empty(static_cast<std::int64_t>(x.size())), dweight = empty(c.channels * taps);
  Vector sums = empty(effnet::depthwise_shards(c.images) * 2 * c.channels);
  effnet::depthwise_backward({c.images, shape, gradient, x.data(), weight.data(), prologue, mean.data(), x.data(),
                              dz.data(), sums.data(), dweight.data()},
                             execution);
  std::vector<double> expected(y.size()), of_weight(dweight.size());
  std::size_t output = 0;
  for (std::int64_t n = 0; n < c.images; ++n) {
    for (std::int64_t oy = 0; oy < shape.out_height; ++oy) {
      for (std::int64_t ox = 0; ox < shape.out_width; ++ox) {
        for (std::int64_t ch = 0; ch < c.channels; ++ch, ++output) {
          for (std::int64_t tap = 0; tap < taps; ++tap) {
            const std::int64_t iy = oy * stride - pad + tap / kernel, ix = ox * stride - pad + tap % kernel;
            if (iy < 0 || ix < 0 || iy >= c.height || ix >= c.width) continue;
            const double raw = x[((n * c.height + iy) * c.width + ix) * c.channels + ch];
            const double u = silu(scale[ch] * raw + shift[ch]);
            expected[output] += u * weight[ch * taps + tap];
            of_weight[ch * taps + tap] += u * grad[output];
          }
        }
      }
    }
  }
  expect_close(isa, "depthwise forward", y, expected);
  expect_close(isa, "depthwise weight gradient", dweight, of_weight);
  for (const Vector* values : {&statistics, &dz, &sums}) expect_finite(isa, "depthwise", *values);
  Vector patches = empty(c.images * shape.out_height * shape.out_width * taps * c.channels);
  effnet::patches(c.images, shape, x.data(), patches.data(), execution);
  expect_finite(isa, "patches", patches);
}

void squeeze_excite(const effnet::Execution& execution, const effnet::ExciteShape& shape) {
  const char* isa = execution.kernels.isa;
  const std::int64_t images = shape.images, channels = shape.channels, squeezed = shape.squeezed, parts = 2, kinds = 5;
  const auto act = Activation::silu;
  const auto kind = effnet::Gate::sigmoid;
  const Vector sums = random(images * parts * channels), w1 = random(squeezed * channels), b1 = random(squeezed);
  const Vector w2 = random(channels * squeezed), b2 = random(channels);
  Vector gate = empty(images * channels), pooled = empty(images * channels), hidden = empty(images * squeezed);
  effnet::excite({shape, parts, 0.1f, sums.data(), w1.data(), b1.data(), w2.data(), b2.data(), act, kind, gate.data(),
                  pooled.data(), hidden.data()},
                 execution);
  std::vector<double> expected(hidden.size());
  for (std::int64_t image = 0; image < images; ++image) {
    for (std::int64_t s = 0; s < squeezed; ++s) {
      double sum = b1[s];
      for (std::int64_t c = 0; c < channels; ++c) sum += double(pooled[image * channels + c]) * w1[s * channels + c];
      expected[image * squeezed + s] = sum;
    }
  }
  expect_close(isa, "excite", hidden, expected);
  const Vector of_pixels = random(images * parts * kinds * channels);
  Vector offset = empty(images * channels), grad_logits = empty(images * channels);
  Vector grad_hidden = empty(images * squeezed), norm_sums = empty(images * 2 * channels);
  effnet::excite_backward(
      {shape, parts, kinds, 0.1f, of_pixels.data(), gate.data(), hidden.data(), w1.data(), w2.data(), act, kind,
       offset.data(), grad_logits.data(), grad_hidden.data(), norm_sums.data()},
      execution);
  Vector dw1 = empty(squeezed * channels), db1 = empty(squeezed), dw2 = empty(channels * squeezed);
  Vector db2 = empty(channels);
  effnet::excite_backward_weight({shape, grad_logits.data(), grad_hidden.data(), hidden.data(), pooled.data(), act,
                                  dw1.data(), db1.data(), dw2.data(), db2.data()},
                                 execution);
  for (const Vector* values : {&gate, &pooled, &offset, &grad_logits, &grad_hidden, &norm_sums, &dw1, &db1, &dw2, &db2})
    expect_finite(isa, "squeeze and excite", *values);
}

// A stem, a depthwise layer with squeeze-and-excitation, a projection with a residual, and a pooling head.
void network(const char* isa, std::int64_t channels, std::int64_t size, effnet::Type type) {
  std::vector<effnet::Layer> layers;
  std::vector<Vector> kept;
  const auto keep_values = [&](std::int64_t count) {
    kept.push_back(random(count));
    return kept.back().data();
  };
  const auto add = [&](effnet::LayerKind kind, std::int64_t in, std::int64_t out, std::int64_t kernel,
                       std::int64_t stride, std::int64_t residual, bool pool, std::int64_t squeeze) {
    effnet::LayerSpec spec;
    spec.kind = kind;
    spec.in_channels = in;
    spec.out_channels = out;
    spec.kernel = kernel;
    spec.stride = stride;
    spec.padding = {false, kernel / 2, kernel / 2, kernel / 2, kernel / 2};
    spec.act = Activation::silu;
    spec.residual = residual;
    spec.pool = pool;
    spec.weight.data = keep_values(out * (kind == effnet::LayerKind::conv ? in : 1) * kernel * kernel);
    spec.bias = keep_values(out);
    if (squeeze > 0) {
      spec.excitation = {squeeze,
                         Activation::silu,
                         effnet::Gate::sigmoid,
                         {keep_values(squeeze * out)},
                         keep_values(squeeze),
                         {keep_values(out * squeeze)},
                         keep_values(out)};
    }
    layers.push_back(effnet::pack(spec, type));
  };
  using effnet::LayerKind;
  add(LayerKind::conv, 3, channels, 3, 2, -1, false, 0);
  add(LayerKind::depthwise, channels, channels, 5, 1, -1, false, 4);
  add(LayerKind::conv, channels, channels, 1, 1, 1, false, 0);
  add(LayerKind::conv, channels, 2 * channels, 1, 1, -1, true, 0);
  const effnet::Network made(std::move(layers), {4}, type);
  const Vector image = random(2 * 3 * size * size);
  Vector y = empty(2 * 2 * channels);
  const effnet::View in{const_cast<float*>(image.data()), effnet::Type::f32, 3 * size * size, size * size, size, 1};
  made.run(in, 2, size, size, {{y.data(), effnet::Type::f32, 2 * channels, 1, 1, 1}}, isa, 1, nullptr);
  expect_finite(isa, "network", y);
}

// A driver whose launches add up their parameters. They fail without a function or a context.
std::uint64_t sum_of_parameters = 0;

void* current_context = nullptr;

int get_current(void** context) {
  *context = current_context;
  return 0;
}

int set_current(void* context) {
  current_context = context;
  return 0;
}

int retain(void** context, int device) {
  *context = &current_context;
  return device == 3 ? 0 : 101;
}

int launch_kernel(void* function, unsigned x, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                  void** parameters, void**) {
  for (unsigned i = 0; i < x; ++i) sum_of_parameters += *static_cast<const std::uint64_t*>(parameters[i]);
  return function == nullptr || current_context == nullptr ? 1 : 0;
}

// Launches with differing numbers of parameters, as many as their grid is wide.
void launches() {
  char function = 0;
  std::vector<effnet::Launch> made;
  std::uint64_t expected = 0;
  for (unsigned count : {0u, 3u, 1u, 40u}) {
    effnet::Launch launch{"kernel", &function, count, 1, 1, 32, 0, {}};
    for (unsigned i = 0; i < count; ++i) {
      launch.parameters.push_back({i % 2 == 0 ? -1 : 1, i});
      expected += i + (i % 2 == 0 ? 0 : 1000);
    }
    made.push_back(launch);
  }
  const effnet::Driver driver{launch_kernel, get_current, set_current, retain};
  effnet::Launches(driver, 3, made).run(nullptr, {0, 1000});
  expect(sum_of_parameters == expected, "launches: a sum of parameters");
  made[1].function = nullptr;
  bool thrown = false;
  try {
    effnet::Launches(driver, 3, made).run(nullptr, {0, 1000});
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown, "launches: an error of the driver");
}

}  // namespace

int main() {
  launches();
  const Case cases[] = {{1, 3, 5, 1, 2}, {2, 8, 24, 5, 7}, {3, 17, 16, 9, 8}, {1, 40, 33, 7, 23}, {17, 24, 7, 3, 3}};
  for (const effnet::Kernels* kernels : effnet::kernel_table()) {
    if (!effnet::isa_supported(kernels->isa)) continue;
    for (const Case& c : cases) {
      pointwise({*kernels, 1}, c);
      for (const std::int64_t kernel : {3, 5, 7}) {
        for (const std::int64_t stride : {1, 2, 3}) depthwise({*kernels, 1}, c, kernel, stride);
      }
    }
    for (const effnet::ExciteShape& shape : {effnet::ExciteShape{1, 3, 1}, {3, 40, 10}, {17, 24, 33}, {50, 17, 49}}) {
      squeeze_excite({*kernels, 1}, shape);
    }
    for (const std::int64_t channels : {8, 17, 40}) {
      network(kernels->isa, channels, 15, effnet::Type::f32);
      if (kernels->bf16 != nullptr) network(kernels->isa, channels, 15, effnet::Type::bf16);
    }
    std::printf("%s: done\n", kernels->isa);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
