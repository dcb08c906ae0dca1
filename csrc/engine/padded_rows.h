// Rows of a map with zeros left and right of them, so that a convolution over them has no border.
#pragma once

#include "engine/view.h"
#include "kernels/conv_shape.h"

namespace effnet {

// Copies rows [begin, begin + rows) of an image, some of which may lie outside of it, to
// [rows, padded_width, padded_channels] with zeros around the image, in a type that need not be the map's.
template <class T>
void copy_padded_rows(const View& map, std::int64_t image, const ConvShape& shape, std::int64_t begin,
                      std::int64_t rows, T* to);

}  // namespace effnet
