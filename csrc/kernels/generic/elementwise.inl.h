// The gate of squeeze-and-excitation, and its product with a map or with weights.
#pragma once

#include "kernels/generic/activation.inl.h"

namespace {

template <int L>
EFFNET_INLINE void gate_vector(float* values, effnet::Gate gate) {
  F<L> value[1] = {load<L>(values)};
  if (gate == effnet::Gate::sigmoid) {
    value[0] = sigmoid<L>(value[0]);
  } else {
    value[0] = at_most<L>(at_least<L>(value[0] + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
  }
  store<L>(values, value[0]);
}

template <int L>
void gate(float* values, std::int64_t count, effnet::Gate gate) {
  std::int64_t i = 0;
  for (; i + L <= count; i += L) gate_vector<L>(values + i, gate);
  for (; i < count; ++i) gate_vector<1>(values + i, gate);
}

template <int L>
void scale_rows(const float* x, std::int64_t x_row, const float* factors, float* y, std::int64_t y_row,
                std::int64_t rows, std::int64_t count) {
  for (std::int64_t row = 0; row < rows; ++row, x += x_row, y += y_row) {
    std::int64_t i = 0;
    for (; i + L <= count; i += L) store<L>(y + i, load<L>(x + i) * load<L>(factors + i));
    for (; i < count; ++i) y[i] = x[i] * factors[i];
  }
}

template <int L>
void scale_panel(const float* x, const float* factors, float* y, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    const F<L> factor = broadcast<L>(factors[row]);
    for (std::int64_t i = 0; i < columns; i += L) store<L>(y + i, load<L>(x + i) * factor);
  }
}

}  // namespace
