// Rows of a map with zeros left and right of them, so that a convolution over them has no border.
#pragma once

#include <cstdint>

#include "engine/layer.h"

namespace effnet {

// The sizes of a convolution's input and output.
struct Geometry {
  std::int64_t kernel, stride;
  std::int64_t height, width;          // of the input
  std::int64_t left, top;              // zeros before it
  std::int64_t out_height, out_width;

  // Pixels of a padded row: what the kernel reaches, and at least the input.
  std::int64_t padded_width() const {
    const std::int64_t reached = (out_width - 1) * stride + kernel;
    return reached > left + width ? reached : left + width;
  }
  std::int64_t in_row(std::int64_t out_row) const { return out_row * stride - top; }
  // Input rows that output rows [begin, end) need, clipped to the image.
  std::int64_t first_row(std::int64_t begin) const { return clip(in_row(begin)); }
  std::int64_t end_row(std::int64_t end) const { return clip(in_row(end - 1) + kernel); }

 private:
  std::int64_t clip(std::int64_t row) const { return row < 0 ? 0 : row > height ? height : row; }
};

Geometry geometry_of(const LayerSpec& layer, std::int64_t height, std::int64_t width);

// A map in memory, with strides in floats.
struct Map {
  const float* data;
  std::int64_t image, channel, row, pixel;
};

// Rows [begin, begin + rows) of an image, which may lie outside of it, to [rows, padded_width, channels] with zeros
// around the image.
void copy_padded_rows(const Map& map, std::int64_t image, const Geometry& geometry, std::int64_t begin,
                      std::int64_t rows, std::int64_t channels, float* to);

}  // namespace effnet
