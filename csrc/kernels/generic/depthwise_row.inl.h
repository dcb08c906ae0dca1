// Depthwise convolution of one row and one panel of channels. A register tile is T output columns by L channels.
//
// For one row of the kernel a tile keeps K taps and T accumulators in registers and loads each input pixel once, so
// that multiplies limit its speed, not loads.
#pragma once

#include "kernels/generic/activation.inl.h"
#include "kernels/generic/bf16.inl.h"

namespace {

template <class Y, int L, int K, int S, int T>
EFFNET_NOINLINE void depthwise_tile(const effnet::DepthwiseRow<Y>& row, std::int64_t lane, std::int64_t column) {
  constexpr int pixel = effnet::panel_columns;
  const float* packed = row.packed + lane;
  F<L> sums[T];
  const F<L> bias = load<L>(packed);
  unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { sums[t.value] = bias; });
  const std::int64_t first = lane + column * row.stride * pixel;
  const float* taps = packed + (1 + row.tap_begin * K) * pixel;
  for (std::int64_t tap_row = row.tap_begin; tap_row < row.tap_end; ++tap_row, taps += K * pixel) {
    const float* x = row.x[tap_row] + first;
    F<L> tap[K];
    unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA { tap[k.value] = load<L>(taps + k.value * pixel); });
    unrolled<0, (T - 1) * S + K>([&](auto i) EFFNET_INLINE_LAMBDA {
      constexpr int offset = decltype(i)::value;
      // The columns whose kernel covers this pixel: none for some pixels where the stride is larger than K.
      constexpr int begin = offset < K ? 0 : (offset - K) / S + 1;
      constexpr int end = offset / S + 1 < T ? offset / S + 1 : T;
      if constexpr (begin < end) {
        const F<L> value = load_once<L>(x + offset * pixel);
        unrolled<begin, end>(
            [&](auto t) EFFNET_INLINE_LAMBDA { sums[t.value] += value * tap[offset - decltype(t)::value * S]; });
      }
    });
  }
  activate<Y, L, T>(sums, row.act);
  Y* y = row.y + column * row.y_pixel + lane;
  unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { store<L>(y + t.value * row.y_pixel, sums[t.value]); });
  if (row.sums != nullptr) {
    F<L> total = load<L>(row.sums + lane);
    unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { total += sums[t.value]; });
    store<L>(row.sums + lane, total);
  }
}

template <class Y>
using DepthwiseTile = void (*)(const effnet::DepthwiseRow<Y>&, std::int64_t, std::int64_t);

template <class Y, int L, int K, int S, class Widths>
struct DepthwiseTiles;
template <class Y, int L, int K, int S, int... T>
struct DepthwiseTiles<Y, L, K, S, Integers<T...>> {
  static constexpr DepthwiseTile<Y> of[] = {depthwise_tile<Y, L, K, S, T>...};
};

// Divides the row into tiles of nearly equal width, at most Most: 14 columns are 7 + 7, not 8 + 6. Strides other than S
// are computed with tiles of one column, which read the stride at run time.
template <int L, int K, int S, int Most, class Y>
void depthwise_columns(const effnet::DepthwiseRow<Y>& row) {
  const std::int64_t most = row.stride == S ? Most : 1;
  const std::int64_t tiles = (row.width + most - 1) / most;
  for (std::int64_t lane = 0; lane < row.channels; lane += L) {
    std::int64_t column = 0;
    for (std::int64_t tile = tiles; tile > 0; --tile) {
      const std::int64_t width = (row.width - column) / tile;
      DepthwiseTiles<Y, L, K, S, typename UpTo<Most>::Type>::of[width - 1](row, lane, column);
      column += width;
    }
  }
}

template <int L, int K, int Most, class Y>
void depthwise_strides(const effnet::DepthwiseRow<Y>& row) {
  if (row.stride == 2) {
    depthwise_columns<L, K, 2, Most>(row);
  } else {
    depthwise_columns<L, K, 1, Most>(row);
  }
}

template <int L, class Y>
void depthwise_row(const effnet::DepthwiseRow<Y>& row) {
  switch (row.kernel) {
    case 3:
      return depthwise_strides<L, 3, largest_tile(8, 3)>(row);
    case 5:
      return depthwise_strides<L, 5, largest_tile(8, 3)>(row);
    // Seven taps, a pixel and eight accumulators would leave no register of sixteen for anything else.
    case 7:
      return depthwise_strides<L, 7, largest_tile(6, 3)>(row);
  }
}

}  // namespace
