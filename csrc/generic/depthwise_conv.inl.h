// Depthwise convolution, channels last: a register tile is T output columns of one row, L channels wide.
//
// For one row of the kernel the tile holds K taps and T accumulators in registers and loads each input pixel once, so
// it is bound by multiplies, not by loads.
#pragma once

#include "activation.inl.h"

namespace {

// One output row while its columns are walked.
struct DepthwiseRow {
  const float* x;                      // [W, C], the input row under the first kernel row, which may be above the image
  float* y;                            // [out_width, C]
  float* sums;                         // [slots, lanes] or null
  std::int64_t tap_begin, tap_end;     // kernel rows that lie inside the image
  std::int64_t slot_begin, slot_end;
};

// Columns [column, column + T) of one output row; Inside says that none of them reads a column outside the image.
template <int L, int K, int S, int T, bool Inside>
EFFNET_NOINLINE void depthwise_tile(const effnet::DepthwiseConv& conv, const DepthwiseRow& row, std::int64_t column) {
  constexpr int packed_stride = (1 + K * K) * L;
  const std::int64_t channels = conv.channels;
  const std::int64_t pitch = conv.width * channels;
  const std::int64_t in_column = column * conv.stride - conv.pad_left;
  const effnet::Activation act = conv.act;
  for (std::int64_t slot = row.slot_begin; slot < row.slot_end; ++slot) {
    const std::int64_t channel = effnet::slot_channel(slot, L, channels);
    const float* packed = conv.packed + slot * packed_stride;
    F<L> sums[T];
    unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { sums[t.value] = load<L>(packed); });
    const float* x = row.x + row.tap_begin * pitch + in_column * channels + channel;
    const float* taps = packed + L + row.tap_begin * K * L;
    for (std::int64_t tap_row = row.tap_begin; tap_row < row.tap_end; ++tap_row, x += pitch, taps += K * L) {
      F<L> tap[K];
      unrolled<0, K>([&](auto k) EFFNET_INLINE_LAMBDA { tap[k.value] = load<L>(taps + k.value * L); });
      unrolled<0, (T - 1) * S + K>([&](auto i) EFFNET_INLINE_LAMBDA {
        constexpr int offset = decltype(i)::value;
        const std::int64_t from = in_column + offset;
        if (Inside || (from >= 0 && from < conv.width)) {
          const F<L> pixel = load<L>(x + offset * channels);
          // The columns whose kernel covers this pixel.
          constexpr int first = offset < K ? 0 : (offset - K) / S + 1;
          constexpr int end = offset / S + 1 < T ? offset / S + 1 : T;
          unrolled<first, end>([&](auto t) EFFNET_INLINE_LAMBDA {
            sums[t.value] += pixel * tap[offset - decltype(t)::value * S];
          });
        }
      });
    }
    activate<L, T>(sums, act);
    float* y = row.y + column * channels + channel;
    unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { store<L>(y + t.value * channels, sums[t.value]); });
    if (row.sums != nullptr) {
      F<L> total = load<L>(row.sums + slot * L);
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { total += sums[t.value]; });
      store<L>(row.sums + slot * L, total);
    }
  }
}

template <int L, int K, int S, int MaxWidth, bool Inside>
void depthwise_tile_of(int width, const effnet::DepthwiseConv& conv, const DepthwiseRow& row, std::int64_t column) {
  if constexpr (MaxWidth > 6) {
    switch (width) {
      case 8: return depthwise_tile<L, K, S, 8, Inside>(conv, row, column);
      case 7: return depthwise_tile<L, K, S, 7, Inside>(conv, row, column);
    }
  }
  if constexpr (MaxWidth > 4) {
    switch (width) {
      case 6: return depthwise_tile<L, K, S, 6, Inside>(conv, row, column);
      case 5: return depthwise_tile<L, K, S, 5, Inside>(conv, row, column);
    }
  }
  switch (width) {
    case 4: return depthwise_tile<L, K, S, 4, Inside>(conv, row, column);
    case 3: return depthwise_tile<L, K, S, 3, false>(conv, row, column);
    case 2: return depthwise_tile<L, K, S, 2, false>(conv, row, column);
    default: return depthwise_tile<L, K, S, 1, false>(conv, row, column);
  }
}

// Cuts a row in tiles of nearly equal width: 14 columns are 7 + 7, not 8 + 6.
template <int L, int K, int S, int MaxWidth>
void depthwise_row(const effnet::DepthwiseConv& conv, const DepthwiseRow& row) {
  // Seven taps, a pixel and eight accumulators would leave no register of sixteen for anything else.
  constexpr int Width = K == 7 && MaxWidth > 6 ? 6 : MaxWidth;
  // A tile of one column reads the stride at run time, so any stride is correct at width 1.
  const std::int64_t limit = conv.stride == S ? Width : 1;
  const std::int64_t tiles = (conv.out_width + limit - 1) / limit;
  std::int64_t column = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const int width = static_cast<int>((conv.out_width - column) / (tiles - tile));
    const std::int64_t in_begin = column * conv.stride - conv.pad_left;
    const std::int64_t in_end = in_begin + (width - 1) * conv.stride + K;
    if (in_begin >= 0 && in_end <= conv.width) {
      depthwise_tile_of<L, K, S, Width, true>(width, conv, row, column);
    } else {
      depthwise_tile_of<L, K, S, Width, false>(width, conv, row, column);
    }
    column += width;
  }
}

template <int L, int K, int MaxWidth>
void depthwise_rows(const effnet::DepthwiseConv& conv, const effnet::DepthwiseBand& band) {
  const std::int64_t pitch = conv.width * conv.channels;
  for (std::int64_t out_row = band.row_begin; out_row < band.row_end; ++out_row) {
    const std::int64_t in_row = out_row * conv.stride - conv.pad_top;
    const std::int64_t index = band.image * conv.out_height + out_row;
    DepthwiseRow row;
    row.x = conv.x + (band.image * conv.height + in_row) * pitch;
    row.y = conv.y + index * conv.out_width * conv.channels;
    row.sums = conv.row_sums == nullptr ? nullptr : conv.row_sums + index * conv.slots * L;
    row.tap_begin = in_row < 0 ? (-in_row < K ? -in_row : K) : 0;
    row.tap_end = in_row + K > conv.height ? (conv.height > in_row ? conv.height - in_row : 0) : K;
    if (row.tap_end < row.tap_begin) row.tap_end = row.tap_begin;
    row.slot_begin = band.slot_begin;
    row.slot_end = band.slot_end;
    if (row.sums != nullptr) {
      for (std::int64_t i = band.slot_begin * L; i < band.slot_end * L; ++i) row.sums[i] = 0.0f;
    }
    if (conv.stride == 2) {
      depthwise_row<L, K, 2, MaxWidth>(conv, row);
    } else {
      depthwise_row<L, K, 1, MaxWidth>(conv, row);
    }
  }
}

template <int L, int MaxWidth>
void depthwise_conv(const effnet::DepthwiseConv& conv, const effnet::DepthwiseBand& band) {
  switch (conv.kernel) {
    case 3: return depthwise_rows<L, 3, MaxWidth>(conv, band);
    case 5: return depthwise_rows<L, 5, MaxWidth>(conv, band);
    case 7: return depthwise_rows<L, 7, MaxWidth>(conv, band);
  }
}

}  // namespace
