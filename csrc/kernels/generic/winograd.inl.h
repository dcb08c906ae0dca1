// The transforms of Winograd's F(4 x 4, 3 x 3): a 3 x 3 convolution of stride 1 computes 4 x 4 outputs of a tile with
// 36 products instead of 144 (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4).
#pragma once

#include "kernels/generic/activation.inl.h"

namespace {

constexpr int tile_outputs = 4, tile_inputs = 6;

// B^T d: six numbers to six, by which a convolution becomes a product of each.
template <int L>
EFFNET_INLINE void transform_input(const F<L> (&d)[tile_inputs], F<L> (&to)[tile_inputs]) {
  const F<L> even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const F<L> even_half = d[4] - d[2], odd_half = 2.0f * (d[3] - d[1]);
  to[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = even_half + odd_half;
  to[4] = even_half - odd_half;
  to[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// A^T m: six products to four outputs.
template <int L>
EFFNET_INLINE void transform_output(const F<L> (&m)[tile_inputs], F<L> (&to)[tile_outputs]) {
  const F<L> sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  to[0] = m[0] + sum + far_sum;
  to[1] = difference + 2.0f * far_difference;
  to[2] = sum + 4.0f * far_sum;
  to[3] = difference + 8.0f * far_difference + m[5];
}

template <int L>
EFFNET_INLINE void winograd_input_lanes(const effnet::WinogradInput& call, const float* x, float* to) {
  F<L> columns[tile_inputs][tile_inputs];
  unrolled<0, tile_inputs>([&](auto j) EFFNET_INLINE_LAMBDA {
    F<L> d[tile_inputs];
    unrolled<0, tile_inputs>(
        [&](auto i) EFFNET_INLINE_LAMBDA { d[i.value] = load<L>(x + i.value * call.x_row + j.value * call.channels); });
    transform_input<L>(d, columns[j.value]);
  });
  unrolled<0, tile_inputs>([&](auto i) EFFNET_INLINE_LAMBDA {
    F<L> d[tile_inputs], row[tile_inputs];
    unrolled<0, tile_inputs>([&](auto j) EFFNET_INLINE_LAMBDA { d[j.value] = columns[j.value][i.value]; });
    transform_input<L>(d, row);
    unrolled<0, tile_inputs>([&](auto j) EFFNET_INLINE_LAMBDA {
      store<L>(to + (i.value * tile_inputs + j.value) * call.to_product, row[j.value]);
    });
  });
}

template <int L>
void winograd_input(const effnet::WinogradInput& call) {
  for (std::int64_t tile = 0; tile < call.tiles; ++tile) {
    const float* x = call.x + tile * tile_outputs * call.channels;
    float* to = call.to + tile * call.channels;
    std::int64_t c = 0;
    for (; c + L <= call.channels; c += L) winograd_input_lanes<L>(call, x + c, to + c);
    for (; c < call.channels; ++c) winograd_input_lanes<1>(call, x + c, to + c);
  }
}

template <int L>
void winograd_output(const effnet::WinogradOutput& call) {
  for (std::int64_t tile = 0; tile < call.tiles; ++tile) {
    const std::int64_t left = call.width - tile * tile_outputs;
    const std::int64_t pixels = left < tile_outputs ? left : tile_outputs;
    for (std::int64_t lane = 0; lane < call.channels; lane += L) {
      const float* m = call.m + tile * call.m_tile + lane;
      F<L> rows[tile_inputs][tile_outputs];
      unrolled<0, tile_inputs>([&](auto i) EFFNET_INLINE_LAMBDA {
        F<L> products[tile_inputs];
        unrolled<0, tile_inputs>([&](auto j) EFFNET_INLINE_LAMBDA {
          products[j.value] = load<L>(m + (i.value * tile_inputs + j.value) * call.m_product);
        });
        transform_output<L>(products, rows[i.value]);
      });
      const F<L> bias = load<L>(call.bias + lane);
      F<L> outputs[tile_outputs * tile_outputs];
      unrolled<0, tile_outputs>([&](auto j) EFFNET_INLINE_LAMBDA {
        F<L> column[tile_inputs], to[tile_outputs];
        unrolled<0, tile_inputs>([&](auto i) EFFNET_INLINE_LAMBDA { column[i.value] = rows[i.value][j.value]; });
        transform_output<L>(column, to);
        unrolled<0, tile_outputs>(
            [&](auto i) EFFNET_INLINE_LAMBDA { outputs[i.value * tile_outputs + j.value] = to[i.value] + bias; });
      });
      activate<float, L, tile_outputs * tile_outputs>(outputs, call.act);
      const std::int64_t offset = tile * tile_outputs * call.y_pixel + lane;
      for (std::int64_t row = 0; row < call.rows; ++row) {
        for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
          const std::int64_t at = offset + row * call.y_row + pixel * call.y_pixel;
          F<L> value = outputs[row * tile_outputs + pixel];
          if (call.residual != nullptr) value += load<L>(call.residual + at);
          store<L>(call.y + at, value);
        }
      }
    }
  }
}

}  // namespace
