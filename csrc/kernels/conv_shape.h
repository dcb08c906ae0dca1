// The sizes of a convolution.
#pragma once

#include <cstdint>

namespace effnet {

// For one image: the channels and the map of the input, the map of the output, the kernel, and the zeros left of the
// map and above it.
struct ConvShape {
  std::int64_t channels, height, width, out_height, out_width;
  std::int64_t kernel, stride, left, top;

  // Pixels of a padded row: the input with the zeros left of it, and as far as the kernel reaches.
  std::int64_t padded_width() const {
    const std::int64_t reached = (out_width - 1) * stride + kernel;
    return reached > left + width ? reached : left + width;
  }
  // The first input row that an output row reads, which may lie above the map.
  std::int64_t in_row(std::int64_t out_row) const { return out_row * stride - top; }
  // The input rows [first_row(begin), end_row(end)) that output rows [begin, end) read, clipped to the map.
  std::int64_t first_row(std::int64_t begin) const { return clip(in_row(begin)); }
  std::int64_t end_row(std::int64_t end) const { return clip(in_row(end - 1) + kernel); }

 private:
  std::int64_t clip(std::int64_t row) const { return row < 0 ? 0 : row > height ? height : row; }
};

}  // namespace effnet
