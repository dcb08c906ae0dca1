// Makes the arguments of kernels that work on rows: rows of maps and of panels, and what all rows of an image have in
// common of a prologue or an output's gradient.
#pragma once

#include <algorithm>

#include "operators/operators.h"

namespace effnet {

inline std::int64_t panels_of(std::int64_t channels) { return (channels + panel_columns - 1) / panel_columns; }

// A null pointer stays null.
inline const float* offset(const float* from, std::int64_t floats) { return from == nullptr ? nullptr : from + floats; }

// The rows of a map from a pixel and a channel on. Not const, because the same struct describes a kernel's output.
inline Rows map_rows(const float* map, std::int64_t pixel, std::int64_t channels, std::int64_t channel = 0) {
  return {map == nullptr ? nullptr : const_cast<float*>(map) + pixel * channels + channel, channels, panel_columns};
}

// The channels in a panel: 16, but for the last one.
inline std::int64_t columns_of(std::int64_t panel, std::int64_t channels) {
  return std::min(panel_columns, channels - panel * panel_columns);
}

// Copies one panel of the columns of a matrix [rows, columns]: to [rows, 16], filled up with zeros.
inline void pack_panel(const float* matrix, std::int64_t rows, std::int64_t columns, std::int64_t panel, float* to) {
  const std::int64_t real = columns_of(panel, columns);
  matrix += panel * panel_columns;
  for (std::int64_t row = 0; row < rows; ++row, matrix += columns, to += panel_columns) {
    // A number of columns that the compiler knows is copied by vectors.
    if (real == panel_columns) {
      std::copy_n(matrix, panel_columns, to);
    } else {
      std::fill(std::copy_n(matrix, real, to), to + panel_columns, 0.0f);
    }
  }
}

// Rows in panels, one panel after another.
inline Rows panel_rows(float* panels, std::int64_t rows) { return {panels, panel_columns, rows * panel_columns}; }

// A prologue for the rows of an image, from channel `first` on; x, to and rows are left to the caller.
inline ActivateRows activate_rows(const Prologue& prologue, std::int64_t image, std::int64_t channels,
                                  std::int64_t first = 0) {
  ActivateRows load{};
  load.scale = offset(prologue.scale, first);
  load.shift = offset(prologue.shift, first);
  load.factor = offset(prologue.gate, image * channels + first);
  load.channels = channels - first;
  load.act = prologue.act;
  return load;
}

// gate * drop_path_scale of an image, [channels], or null where both are; written to `to` where it has to be computed.
inline const float* gate_times_drop_path(const float* gate, const float* drop_path_scale, std::int64_t image,
                                         std::int64_t channels, float* to) {
  gate = offset(gate, image * channels);
  if (drop_path_scale == nullptr) return gate;
  for (std::int64_t c = 0; c < channels; ++c) to[c] = drop_path_scale[image] * (gate != nullptr ? gate[c] : 1.0f);
  return to;
}

// An output's gradient for the rows of an image; grad, y, to and rows are left to the caller. `factor` is memory for
// [channels].
inline GradientRows gradient_rows(const OutputGradient& gradient, std::int64_t image, std::int64_t channels,
                                  float* factor) {
  GradientRows load{};
  load.factor = gate_times_drop_path(gradient.gate, gradient.drop_path_scale, image, channels, factor);
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

// The backward pass of a prologue for one panel of the rows of an image, from `channel` on; dq, the maps, rows and sums
// are left to the caller.
inline ActGradPanel act_grad_panel(const Prologue& prologue, const float* mean, std::int64_t image,
                                   std::int64_t channels, std::int64_t channel) {
  ActGradPanel back{};
  back.scale = offset(prologue.scale, channel);
  back.shift = offset(prologue.shift, channel);
  back.mean = offset(mean, channel);
  back.gate = offset(prologue.gate, image * channels + channel);
  back.columns = columns_of(channel / panel_columns, channels);
  back.act = prologue.act;
  return back;
}

}  // namespace effnet
