// Maps: their sizes, and where they lie in memory.
#pragma once

#include <cstdint>

namespace effnet {

// Sizes of one image's map.
struct MapSize {
  std::int64_t channels, height, width;
};

// A map in memory: the address of its first number, and the strides of its dimensions in floats. The caller's image and
// outputs may have any strides.
struct View {
  float* data;
  std::int64_t image, channel, row, pixel;
};

}  // namespace effnet
