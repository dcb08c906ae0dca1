// The gate of squeeze-and-excitation, and its product with a map or with weights.
#pragma once

#include "kernels/generic/activation.inl.h"
#include "kernels/generic/bf16.inl.h"

namespace {

template <int L>
EFFNET_INLINE void gate_vector(float* values, effnet::Gate gate) {
  F<L> value[1] = {load<L>(values)};
  switch (gate) {
    case effnet::Gate::sigmoid:
      value[0] = sigmoid<L>(value[0]);
      break;
    case effnet::Gate::hardsigmoid:
      value[0] = at_most<L>(at_least<L>(value[0] + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
      break;
  }
  store<L>(values, value[0]);
}

template <int L>
void gate(float* values, std::int64_t count, effnet::Gate gate) {
  std::int64_t i = 0;
  for (; i + L <= count; i += L) gate_vector<L>(values + i, gate);
  for (; i < count; ++i) gate_vector<1>(values + i, gate);
}

template <int L, class T>
void scale_rows(const T* x, std::int64_t x_row, const float* factors, T* y, std::int64_t y_row, std::int64_t rows,
                std::int64_t count) {
  for (std::int64_t row = 0; row < rows; ++row, x += x_row, y += y_row) {
    std::int64_t i = 0;
    for (; i + L <= count; i += L) store<L>(y + i, load<L>(x + i) * load<L>(factors + i));
    for (; i < count; ++i) store<1>(y + i, load<1>(x + i) * load<1>(factors + i));
  }
}

template <int L>
void scale_panel(const float* x, const float* factors, float* y, std::int64_t inner) {
  constexpr int columns = effnet::panel_columns;
  for (std::int64_t k = 0; k < inner; ++k, x += columns, y += columns) {
    const F<L> factor = broadcast<L>(factors[k]);
    for (int i = 0; i < columns; i += L) store<L>(y + i, load<L>(x + i) * factor);
  }
}

template <int L>
void scale_panel(const Bf16* x, const float* factors, Bf16* y, std::int64_t inner) {
  constexpr int columns = effnet::panel_columns;
  for (std::int64_t k = 0; k < inner; k += 2, x += 2 * columns, y += 2 * columns) {
    // The second number of an incomplete pair is a zero.
    const F<L> even = broadcast<L>(factors[k]), odd = broadcast<L>(k + 1 < inner ? factors[k + 1] : 0.0f);
    for (int i = 0; i < columns; i += L) {
      const U<L> pairs = load_pairs<L>(x + 2 * i);
      const auto lower = rounded_to_bf16<L>(as_floats<L>(pairs << 16) * even);
      const auto upper = rounded_to_bf16<L>(as_floats<L>(pairs & 0xffff0000u) * odd);
      const U<L> scaled = converted<U<L>>(lower) | converted<U<L>>(upper) << 16;
      memcpy(y + 2 * i, &scaled, sizeof scaled);
    }
  }
}

}  // namespace
