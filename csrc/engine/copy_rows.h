// Copies of rows of a map, from one type and strides to another.
#pragma once

#include "engine/view.h"
#include "kernels/conv_shape.h"

namespace effnet {

// Copies a row of a map of this size; rows count on from image to image.
void copy_row(const View& from, const View& to, const MapSize& size, std::int64_t row);

// Copies rows [begin, begin + rows) of an image, some of which may lie outside of it, to
// [rows, padded_width, padded_channels] with zeros around the image, so that a convolution over them has no border.
template <class T>
void copy_padded_rows(const View& map, std::int64_t image, const ConvShape& shape, std::int64_t begin,
                      std::int64_t rows, T* to);

}  // namespace effnet
