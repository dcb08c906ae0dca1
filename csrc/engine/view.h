// Maps: their sizes, and where they lie in memory.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "platform/buffer.h"

namespace effnet {

// The type of numbers in memory.
enum class Type : std::int32_t { f32, bf16 };

template <class T>
constexpr Type type_of = sizeof(T) == sizeof(Bf16) ? Type::bf16 : Type::f32;

constexpr std::int64_t size_of(Type type) { return type == Type::bf16 ? sizeof(Bf16) : sizeof(float); }

// Numbers of a pixel in the operand of a dense convolution: pairs for bfloat16, the last one filled up with a zero, so
// that no pair has numbers of two pixels.
inline std::int64_t padded_channels(Type type, std::int64_t channels) {
  return type == Type::bf16 ? round_up(channels, 2) : channels;
}

// Sizes of one image's map.
struct MapSize {
  std::int64_t channels, height, width;
};

// A map in memory: the address of its first number, and the strides of its dimensions in numbers. The caller's image
// and outputs may have any strides.
struct View {
  void* data;
  Type type;
  std::int64_t image, channel, row, pixel;

  template <class T>
  T* at(std::int64_t offset) const {
    return static_cast<T*>(data) + offset;
  }
  // Whether the channels of a pixel, the pixels, and the images of a map of this size lie one behind the other.
  bool is_dense(const MapSize& size, std::int64_t images) const {
    return (channel == 1 || size.channels == 1) && (pixel == size.channels || size.width == 1) &&
           (row == size.width * size.channels || size.height == 1) &&
           (image == size.height * size.width * size.channels || images == 1);
  }
  // The map from an image on.
  View from_image(std::int64_t index) const {
    View view = *this;
    view.data = static_cast<char*>(data) + index * image * size_of(type);
    return view;
  }
};

}  // namespace effnet
