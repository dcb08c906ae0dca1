#include "engine/padded_rows.h"

#include <algorithm>

namespace effnet {

void copy_padded_rows(const View& map, std::int64_t image, const ConvShape& shape, std::int64_t begin,
                      std::int64_t rows, float* to) {
  const std::int64_t channels = shape.channels;
  const std::int64_t pitch = shape.padded_width() * channels;
  for (std::int64_t row = begin; row < begin + rows; ++row, to += pitch) {
    if (row < 0 || row >= shape.height) {
      std::fill(to, to + pitch, 0.0f);
      continue;
    }
    std::fill(to, to + shape.left * channels, 0.0f);
    std::fill(to + (shape.left + shape.width) * channels, to + pitch, 0.0f);
    float* inside = to + shape.left * channels;
    const float* from = map.data + image * map.image + row * map.row;
    if (map.channel == 1) {
      for (std::int64_t x = 0; x < shape.width; ++x) {
        const float* pixel = from + x * map.pixel;
        for (std::int64_t c = 0; c < channels; ++c) inside[x * channels + c] = pixel[c];
      }
    } else if (channels == 3) {
      const float *red = from, *green = from + map.channel, *blue = from + 2 * map.channel;
      for (std::int64_t x = 0; x < shape.width; ++x) {
        inside[3 * x] = red[x * map.pixel];
        inside[3 * x + 1] = green[x * map.pixel];
        inside[3 * x + 2] = blue[x * map.pixel];
      }
    } else {
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t x = 0; x < shape.width; ++x) {
          inside[x * channels + c] = from[c * map.channel + x * map.pixel];
        }
      }
    }
  }
}

}  // namespace effnet
