#include "engine/padded_rows.h"

#include <algorithm>

namespace effnet {

Geometry geometry_of(const LayerSpec& layer, std::int64_t height, std::int64_t width) {
  Geometry geometry{layer.kernel, layer.stride, height, width, layer.padding.left, layer.padding.top, 0, 0};
  std::int64_t right = layer.padding.right, bottom = layer.padding.bottom;
  if (layer.padding.same) {
    const auto total = [&](std::int64_t size) {
      return std::max<std::int64_t>(0, (ceil_div(size, layer.stride) - 1) * layer.stride + layer.kernel - size);
    };
    geometry.left = total(width) / 2;
    geometry.top = total(height) / 2;
    right = total(width) - geometry.left;
    bottom = total(height) - geometry.top;
  }
  const auto out = [&](std::int64_t size) { return size < layer.kernel ? 0 : (size - layer.kernel) / layer.stride + 1; };
  geometry.out_height = out(height + geometry.top + bottom);
  geometry.out_width = out(width + geometry.left + right);
  return geometry;
}

void copy_padded_rows(const Map& map, std::int64_t image, const Geometry& geometry, std::int64_t begin,
                      std::int64_t rows, std::int64_t channels, float* to) {
  const std::int64_t pitch = geometry.padded_width() * channels;
  for (std::int64_t row = begin; row < begin + rows; ++row, to += pitch) {
    if (row < 0 || row >= geometry.height) {
      std::fill(to, to + pitch, 0.0f);
      continue;
    }
    std::fill(to, to + geometry.left * channels, 0.0f);
    std::fill(to + (geometry.left + geometry.width) * channels, to + pitch, 0.0f);
    float* inside = to + geometry.left * channels;
    const float* from = map.data + image * map.image + row * map.row;
    if (map.channel == 1) {
      for (std::int64_t x = 0; x < geometry.width; ++x) {
        const float* pixel = from + x * map.pixel;
        for (std::int64_t c = 0; c < channels; ++c) inside[x * channels + c] = pixel[c];
      }
    } else if (channels == 3) {
      const float *red = from, *green = from + map.channel, *blue = from + 2 * map.channel;
      for (std::int64_t x = 0; x < geometry.width; ++x) {
        inside[3 * x] = red[x * map.pixel];
        inside[3 * x + 1] = green[x * map.pixel];
        inside[3 * x + 2] = blue[x * map.pixel];
      }
    } else {
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t x = 0; x < geometry.width; ++x) {
          inside[x * channels + c] = from[c * map.channel + x * map.pixel];
        }
      }
    }
  }
}

}  // namespace effnet
