// Matrix product of pixels and a packed panel of 16 columns. A register tile is Rows rows by V vectors of L columns.
//
// Each step of the inner dimension loads V vectors of the panel once and broadcasts one number of each row, so that a
// tile does Rows * V multiply-adds for Rows + V loads. The accumulators and a few vectors of the panel have to fit in
// the registers: 6 x 2 in sixteen, 14 x 1 in thirty-two (where a broadcast is part of the multiply-add).
#pragma once

#include "kernels/generic/activation.inl.h"

namespace {

// Where a tile's operands and results are; each tile moves it on to the next.
struct GemmPlace {
  const float* a;
  std::int64_t offset;  // of the first row, in y and the residual
  std::int64_t x;       // the first row's pixel within its line
  const float* prefetch_dst;
};

template <int L, int Rows, int V, int Chains = 1>
EFFNET_NOINLINE void gemm_tile(const effnet::Gemm& gemm, std::int64_t column, GemmPlace& place) {
  F<L> sums[Rows * V];
  unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
    const F<L> bias = load<L>(gemm.bias + column + v.value * L);
    unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA { sums[r.value * V + v.value] = bias; });
  });
  if (gemm.prefetch_dst != nullptr) {
    unrolled<0, Rows>(
        [&](auto r) EFFNET_INLINE_LAMBDA { prefetch_to_write(place.prefetch_dst + r.value * gemm.prefetch_dst_row); });
    place.prefetch_dst += Rows * gemm.prefetch_dst_row;
  }
  // The steps of the inner dimension alternate between this many sets of sums. With a single one, each addition of a
  // small tile would wait for the result of the last.
  F<L> more[Chains][Rows * V] = {};
  // Three rows share a pointer: with the stride times 0, 1 and 2 that is all an address can express, and a pointer a
  // row would not fit in the general registers.
  constexpr int Pointers = (Rows + 2) / 3;
  const std::int64_t stride = gemm.a_row;
  const float* b = gemm.b + column;
  // The next panel is prefetched line by line while this one is used, because weights are read once for a few rows and
  // are often not in cache.
  const std::intptr_t next_panel =
      gemm.next_b != nullptr ? reinterpret_cast<std::intptr_t>(gemm.next_b) - reinterpret_cast<std::intptr_t>(gemm.b)
                             : static_cast<std::intptr_t>(sizeof(float)) *
                                   (gemm.segments * gemm.segment_length - gemm.k_tail_padding) * effnet::panel_columns;
  // So are the next tile's rows, if they follow in memory.
  const float* next_rows = place.a + Rows * stride;
  for (std::int64_t segment = 0; segment < gemm.segments; ++segment) {
    const float* a[Pointers];
    unrolled<0, Pointers>(
        [&](auto p) EFFNET_INLINE_LAMBDA { a[p.value] = place.a + segment * gemm.a_segment + 3 * p.value * stride; });
    const auto multiply = [&](F<L>(&to)[Rows* V]) EFFNET_INLINE_LAMBDA {
      prefetch(reinterpret_cast<const float*>(reinterpret_cast<std::intptr_t>(b) + next_panel));
      prefetch(next_rows);
      next_rows += Rows;
      F<L> panel[V];
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA { panel[v.value] = load<L>(b + v.value * L); });
      unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA {
        const F<L> value = broadcast<L>(a[r.value / 3][r.value % 3 * stride]);
        unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA { to[r.value * V + v.value] += value * panel[v.value]; });
      });
      b += effnet::panel_columns;
      unrolled<0, Pointers>([&](auto p) EFFNET_INLINE_LAMBDA { ++a[p.value]; });
    };
    std::int64_t k = segment + 1 < gemm.segments ? gemm.segment_length : gemm.segment_length - gemm.k_tail_padding;
    for (; k >= Chains; k -= Chains) {
      multiply(sums);
      unrolled<1, Chains>([&](auto chain) EFFNET_INLINE_LAMBDA { multiply(more[chain.value]); });
    }
    if constexpr (Chains > 1) {
      for (; k > 0; --k) multiply(sums);
    }
  }
  unrolled<1, Chains>([&](auto chain) EFFNET_INLINE_LAMBDA {
    unrolled<0, Rows * V>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] += more[chain.value][i.value]; });
  });
  activate<L, Rows * V>(sums, gemm.act);
  float* y = gemm.y + place.offset + column;
  const float* residual = gemm.residual + place.offset + column;
  std::int64_t step = 0, x = place.x;
  if (gemm.residual == nullptr && gemm.y != nullptr && (gemm.gap == 0 || x + Rows <= gemm.width)) {
    // The common case: all rows are in one line, and there is no residual.
    unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA {
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA { store<L>(y + v.value * L, sums[r.value * V + v.value]); });
      y += gemm.y_row;
    });
    step = Rows * gemm.y_row;
    x += Rows;
    if (x == gemm.width) {
      x = 0;
      step += gemm.gap;
    }
  } else {
    unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA {
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
        F<L>& value = sums[r.value * V + v.value];
        if (gemm.residual != nullptr) value += load<L>(residual + step + v.value * L);
        if (gemm.y != nullptr) store<L>(y + step + v.value * L, value);
      });
      step += gemm.y_row;
      if (++x == gemm.width) {
        x = 0;
        step += gemm.gap;
      }
    });
  }
  if (gemm.sums != nullptr) {
    unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
      float* to = gemm.sums + column + v.value * L;
      F<L> total = load<L>(to);
      unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA { total += sums[r.value * V + v.value]; });
      store<L>(to, total);
    });
  }
  place.a += Rows * stride;
  place.offset += step;
  place.x = x;
}

using GemmTile = void (*)(const effnet::Gemm&, std::int64_t, GemmPlace&);

template <int L, int V, int... Rows>
struct GemmTiles {
  static constexpr GemmTile of[] = {gemm_tile<L, Rows, V>...};
};

// Columns [column, column + V * L) of the panel. Rows are divided into tiles of nearly equal height: 49 rows are seven
// tiles of 7, not six of 8 and one of 1.
template <int L, int V, int... Rows>
void gemm_columns(const effnet::Gemm& gemm, std::int64_t column) {
  constexpr std::int64_t Most = sizeof...(Rows);
  GemmPlace place{gemm.a, 0, 0, gemm.prefetch_dst};
  if (gemm.row_by_row) {
    for (std::int64_t row = 0; row < gemm.rows; ++row) gemm_tile<L, 1, V, 8 / V>(gemm, column, place);
    return;
  }
  const std::int64_t tiles = (gemm.rows + Most - 1) / Most;
  std::int64_t left = gemm.rows;
  for (std::int64_t tile = tiles; tile > 0; --tile) {
    const std::int64_t rows = left / tile;
    GemmTiles<L, V, Rows...>::of[rows - 1](gemm, column, place);
    left -= rows;
  }
}

}  // namespace
