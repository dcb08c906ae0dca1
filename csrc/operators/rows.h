// Operands of the kernels that work on rows: a map's rows from a pixel on, panels, and the parts of a prologue or of an
// output's gradient that all rows of an image share.
#pragma once

#include <algorithm>

#include "operators/operators.h"

namespace effnet {

inline const float* offset(const float* from, std::int64_t floats) { return from == nullptr ? nullptr : from + floats; }

// A map's rows from one of its pixels and channels on; kernels write through one only where they are told to.
inline Rows map_rows(const float* map, std::int64_t pixel, std::int64_t channels, std::int64_t channel = 0) {
  return {map == nullptr ? nullptr : const_cast<float*>(map) + pixel * channels + channel, channels, panel_columns};
}

inline std::int64_t columns_of(std::int64_t panel, std::int64_t channels) {
  return std::min(panel_columns, channels - panel * panel_columns);
}

// Rows in panels of their own.
inline Rows panel_rows(float* panels, std::int64_t rows) { return {panels, panel_columns, rows * panel_columns}; }

// What an image's rows owe, from channel `first` on.
inline ActivateRows activate_rows(const Prologue& prologue, std::int64_t image, std::int64_t channels,
                                  std::int64_t first = 0) {
  ActivateRows pay{};
  pay.scale = offset(prologue.scale, first);
  pay.shift = offset(prologue.shift, first);
  pay.factor = offset(prologue.gate, image * channels + first);
  pay.channels = channels - first;
  pay.act = prologue.act;
  return pay;
}

// gate * keep of an image, [channels], in `to` where it has to be computed; null where there is neither.
inline const float* kept_gate(const float* gate, const float* keep, std::int64_t image, std::int64_t channels, float* to) {
  gate = offset(gate, image * channels);
  if (keep == nullptr) return gate;
  for (std::int64_t c = 0; c < channels; ++c) to[c] = keep[image] * (gate != nullptr ? gate[c] : 1.0f);
  return to;
}

// The part of a load of `gradient` that a whole group shares; `factor` is memory for [channels].
inline GradientRows gradient_rows(const OutputGradient& gradient, std::int64_t image, std::int64_t channels,
                                  float* factor) {
  GradientRows load{};
  load.factor = kept_gate(gradient.gate, gradient.keep, image, channels, factor);
  load.offset = offset(gradient.offset, image * channels);
  load.scale = gradient.scale;
  load.shift = gradient.shift;
  load.alpha = gradient.coefficients;
  load.beta = offset(gradient.coefficients, channels);
  load.gamma = offset(gradient.coefficients, 2 * channels);
  load.channels = channels;
  load.act = gradient.act;
  return load;
}

}  // namespace effnet
