#include "engine/layer.h"

#include <algorithm>

namespace effnet {
namespace {

// The inner dimension is (channel, tap row, tap column) in a weight, and (tap row, tap column, padded channel) in the
// packed matrix, where a row of taps is a segment.
void pack_elements(const Weights& weight, std::int64_t out, std::int64_t channels, std::int64_t kernel, Type type,
                   PackedMatrix& matrix) {
  const std::int64_t taps = kernel * kernel, pixel = padded_channels(type, channels);
  const std::int64_t count = type == Type::bf16 ? 2 : 1;  // numbers of the inner dimension that lie side by side
  for (std::int64_t row = 0; row < out; ++row) {
    float* panel = matrix.panels.get() + row / panel_columns * matrix.panel_floats;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      for (std::int64_t channel = 0; channel < channels; ++channel) {
        const float value = weight.at(row, (row * channels + channel) * taps + tap);
        const std::int64_t k = tap * pixel + channel;
        const std::int64_t index = (k / count * panel_columns + row % panel_columns) * count + k % count;
        if (type == Type::bf16) {
          reinterpret_cast<Bf16*>(panel)[index] = to_bf16(value);
        } else {
          panel[index] = value;
        }
      }
    }
  }
}

PackedMatrix pack_matrix(const Weights& weight, const float* bias, std::int64_t out, std::int64_t channels,
                         std::int64_t kernel, Type type) {
  PackedMatrix matrix;
  matrix.out = out;
  matrix.inner = channels * kernel * kernel;
  const std::int64_t numbers = kernel * kernel * padded_channels(type, channels) * panel_columns;
  matrix.panel_floats = numbers * size_of(type) / size_of(Type::f32);
  matrix.panels = allocate_zeros(matrix.panel_count() * matrix.panel_floats);
  matrix.bias = allocate_zeros(matrix.panel_count() * panel_columns);
  pack_elements(weight, out, channels, kernel, type, matrix);
  std::memcpy(matrix.bias.get(), bias, static_cast<std::size_t>(out) * sizeof(float));
  return matrix;
}

// G g G^T of each pair of channels (see kernels/generic/winograd.inl.h), in double precision.
Buffer pack_winograd(const Weights& weight, std::int64_t out, std::int64_t channels) {
  constexpr double g[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};
  constexpr std::int64_t products = 36;
  const std::int64_t panels = ceil_div(out, panel_columns), panel_size = channels * panel_columns;
  Buffer packed = allocate_zeros(panels * products * panel_size);
  for (std::int64_t row = 0; row < out; ++row) {
    const std::int64_t panel = row / panel_columns, first = panel / panels_together * panels_together;
    const std::int64_t together = std::min(panels_together, panels - first);
    for (std::int64_t channel = 0; channel < channels; ++channel) {
      for (std::int64_t i = 0; i < 6; ++i) {
        for (std::int64_t j = 0; j < 6; ++j) {
          double value = 0;
          for (std::int64_t tap = 0; tap < 9; ++tap) {
            value += g[i][tap / 3] * g[j][tap % 3] *
                     static_cast<double>(weight.at(row, (row * channels + channel) * 9 + tap));
          }
          const std::int64_t at = first * products + (i * 6 + j) * together + panel - first;
          packed[static_cast<std::size_t>(at * panel_size + channel * panel_columns + row % panel_columns)] =
              static_cast<float>(value);
        }
      }
    }
  }
  return packed;
}

// Whether the transforms take less time than the products that they save.
bool gains_by_winograd(const LayerSpec& spec, Type type) {
  return spec.winograd && type == Type::f32 && spec.kernel == 3 && spec.stride == 1 && spec.in_channels >= 16 &&
         spec.out_channels >= 16;
}

// [channels, kernel, kernel] and [channels] to [panels, 1 + kernel * kernel, 16].
Buffer pack_taps(const Weights& weight, const float* bias, std::int64_t channels, std::int64_t kernel) {
  const std::int64_t taps = kernel * kernel;
  Buffer packed = allocate_zeros(round_up(channels, panel_columns) * (1 + taps));
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    float* to = packed.get() + channel / panel_columns * (1 + taps) * panel_columns + channel % panel_columns;
    to[0] = bias[channel];
    for (std::int64_t tap = 0; tap < taps; ++tap)
      to[(1 + tap) * panel_columns] = weight.at(channel, channel * taps + tap);
  }
  return packed;
}

LayerSpec without_weights(LayerSpec spec) {
  spec.weight = spec.excitation.w1 = spec.excitation.w2 = {};
  spec.bias = spec.excitation.b1 = spec.excitation.b2 = nullptr;
  return spec;
}

}  // namespace

ConvShape conv_shape(const LayerSpec& layer, std::int64_t height, std::int64_t width) {
  ConvShape shape{layer.in_channels,  height,           width, 0, 0, layer.kernel, layer.stride,
                  layer.padding.left, layer.padding.top};
  std::int64_t right = layer.padding.right, bottom = layer.padding.bottom;
  if (layer.padding.same) {
    const auto total = [&](std::int64_t size) {
      return std::max<std::int64_t>(0, (ceil_div(size, layer.stride) - 1) * layer.stride + layer.kernel - size);
    };
    shape.left = total(width) / 2;
    shape.top = total(height) / 2;
    right = total(width) - shape.left;
    bottom = total(height) - shape.top;
  }
  const auto out = [&](std::int64_t size) {
    return size < layer.kernel ? 0 : (size - layer.kernel) / layer.stride + 1;
  };
  shape.out_height = out(height + shape.top + bottom);
  shape.out_width = out(width + shape.left + right);
  return shape;
}

Layer pack(const LayerSpec& spec, Type type) {
  Layer layer(without_weights(spec));
  if (spec.kind == LayerKind::conv) {
    layer.matrix = pack_matrix(spec.weight, spec.bias, spec.out_channels, spec.in_channels, spec.kernel, type);
    if (gains_by_winograd(spec, type)) {
      layer.matrix.panels.reset();
      layer.winograd = pack_winograd(spec.weight, spec.out_channels, spec.in_channels);
    }
  } else {
    layer.taps = pack_taps(spec.weight, spec.bias, spec.out_channels, spec.kernel);
  }
  const Excitation& excitation = spec.excitation;
  if (excitation.squeeze > 0) {
    layer.reduce = pack_matrix(excitation.w1, excitation.b1, excitation.squeeze, spec.out_channels, 1, Type::f32);
    layer.expand = pack_matrix(excitation.w2, excitation.b2, spec.out_channels, excitation.squeeze, 1, Type::f32);
  }
  return layer;
}

}  // namespace effnet
