#include "engine/copy_rows.h"

#include <algorithm>

#include "engine/bf16.h"

namespace effnet {
namespace {

template <class From, class To>
void copy_row(const From* from, const View& from_view, To* to, const View& to_view, const MapSize& size) {
  for (std::int64_t x = 0; x < size.width; ++x, from += from_view.pixel, to += to_view.pixel) {
    if (from_view.channel == 1 && to_view.channel == 1) {
      for (std::int64_t c = 0; c < size.channels; ++c) to[c] = convert<To>(from[c]);
    } else {
      for (std::int64_t c = 0; c < size.channels; ++c)
        to[c * to_view.channel] = convert<To>(from[c * from_view.channel]);
    }
  }
}

template <class From>
void copy_row(const From* from, const View& from_view, const View& to, const MapSize& size, std::int64_t offset) {
  if (to.type == Type::bf16) {
    copy_row(from, from_view, to.at<Bf16>(offset), to, size);
  } else {
    copy_row(from, from_view, to.at<float>(offset), to, size);
  }
}

template <class From, class To>
void copy(const View& map, std::int64_t image, const ConvShape& shape, std::int64_t begin, std::int64_t rows, To* to) {
  const std::int64_t channels = shape.channels, to_pixel = padded_channels(type_of<To>, channels);
  const std::int64_t pitch = shape.padded_width() * to_pixel;
  for (std::int64_t row = begin; row < begin + rows; ++row, to += pitch) {
    if (row < 0 || row >= shape.height) {
      std::fill(to, to + pitch, To{});
      continue;
    }
    To* inside = to + shape.left * to_pixel;
    std::fill(to, to_pixel == channels ? inside : to + pitch, To{});
    std::fill(inside + shape.width * to_pixel, to + pitch, To{});
    const From* from = map.at<const From>(image * map.image + row * map.row);
    if (map.channel == 1) {
      for (std::int64_t x = 0; x < shape.width; ++x) {
        const From* pixel = from + x * map.pixel;
        for (std::int64_t c = 0; c < channels; ++c) inside[x * to_pixel + c] = convert<To>(pixel[c]);
      }
    } else if (channels == 3) {
      const From *red = from, *green = from + map.channel, *blue = from + 2 * map.channel;
      for (std::int64_t x = 0; x < shape.width; ++x) {
        inside[x * to_pixel] = convert<To>(red[x * map.pixel]);
        inside[x * to_pixel + 1] = convert<To>(green[x * map.pixel]);
        inside[x * to_pixel + 2] = convert<To>(blue[x * map.pixel]);
      }
    } else {
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t x = 0; x < shape.width; ++x) {
          inside[x * to_pixel + c] = convert<To>(from[c * map.channel + x * map.pixel]);
        }
      }
    }
  }
}

}  // namespace

void copy_row(const View& from, const View& to, const MapSize& size, std::int64_t row) {
  const auto offset_in = [&](const View& view) {
    return row / size.height * view.image + row % size.height * view.row;
  };
  if (from.type == Type::bf16) {
    copy_row(from.at<const Bf16>(offset_in(from)), from, to, size, offset_in(to));
  } else {
    copy_row(from.at<const float>(offset_in(from)), from, to, size, offset_in(to));
  }
}

template <class T>
void copy_padded_rows(const View& map, std::int64_t image, const ConvShape& shape, std::int64_t begin,
                      std::int64_t rows, T* to) {
  if (map.type == Type::bf16) {
    copy<Bf16>(map, image, shape, begin, rows, to);
  } else {
    copy<float>(map, image, shape, begin, rows, to);
  }
}

template void copy_padded_rows(const View&, std::int64_t, const ConvShape&, std::int64_t, std::int64_t, float*);
template void copy_padded_rows(const View&, std::int64_t, const ConvShape&, std::int64_t, std::int64_t, Bf16*);

}  // namespace effnet
