#include "engine/layer.h"

#include <algorithm>

namespace effnet {
namespace {

// Calls visit(packed index, weight index) for every element of a weight. The inner dimension is (channel, tap row, tap
// column) in the weight and (tap row, tap column, channel) in the packed matrix, where a row of taps is a segment.
template <class Visit>
void for_each_element(std::int64_t out, std::int64_t channels, std::int64_t kernel, const Visit& visit) {
  const std::int64_t taps = kernel * kernel, inner = taps * channels;
  for (std::int64_t row = 0; row < out; ++row) {
    const std::int64_t panel = row / panel_columns * inner * panel_columns + row % panel_columns;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      for (std::int64_t channel = 0; channel < channels; ++channel) {
        visit(panel + (tap * channels + channel) * panel_columns, (row * channels + channel) * taps + tap);
      }
    }
  }
}

PackedMatrix pack_matrix(const float* weight, const float* bias, std::int64_t out, std::int64_t channels,
                         std::int64_t kernel) {
  PackedMatrix matrix;
  matrix.out = out;
  matrix.inner = channels * kernel * kernel;
  const std::int64_t columns = matrix.panel_count() * panel_columns;
  matrix.panels = allocate_zeros(columns * matrix.inner);
  matrix.bias = allocate_zeros(columns);
  float* packed = matrix.panels.get();
  for_each_element(out, channels, kernel, [&](std::int64_t to, std::int64_t from) { packed[to] = weight[from]; });
  std::memcpy(matrix.bias.get(), bias, static_cast<std::size_t>(out) * sizeof(float));
  return matrix;
}

// [channels, kernel, kernel] and [channels] to [panels, 1 + kernel * kernel, 16].
Buffer pack_taps(const float* weight, const float* bias, std::int64_t channels, std::int64_t kernel) {
  const std::int64_t taps = kernel * kernel;
  Buffer packed = allocate_zeros(round_up(channels, panel_columns) * (1 + taps));
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    float* to = packed.get() + channel / panel_columns * (1 + taps) * panel_columns + channel % panel_columns;
    to[0] = bias[channel];
    for (std::int64_t tap = 0; tap < taps; ++tap) to[(1 + tap) * panel_columns] = weight[channel * taps + tap];
  }
  return packed;
}

LayerSpec without_weights(LayerSpec spec) {
  spec.weight = spec.bias = nullptr;
  spec.excitation.w1 = spec.excitation.b1 = spec.excitation.w2 = spec.excitation.b2 = nullptr;
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

Layer pack(const LayerSpec& spec) {
  Layer layer(without_weights(spec));
  if (spec.kind == LayerKind::conv) {
    layer.matrix = pack_matrix(spec.weight, spec.bias, spec.out_channels, spec.in_channels, spec.kernel);
  } else {
    layer.taps = pack_taps(spec.weight, spec.bias, spec.out_channels, spec.kernel);
  }
  const Excitation& excitation = spec.excitation;
  if (excitation.squeeze > 0) {
    layer.reduce = pack_matrix(excitation.w1, excitation.b1, excitation.squeeze, spec.out_channels, 1);
    layer.expand = pack_matrix(excitation.w2, excitation.b2, spec.out_channels, excitation.squeeze, 1);
  }
  return layer;
}

}  // namespace effnet
