// Matrix product of pixels and one or two packed panels of 16 columns. A register tile is Rows rows by V vectors of L
// columns.
//
// Each step of the inner dimension loads V vectors of the panels once and broadcasts one number of each row (or in
// bfloat16 a pair), so that a tile does Rows * V multiply-adds for Rows + V loads. The accumulators and a few vectors
// of the panels have to fit in the registers: 6 x 2 in sixteen; in thirty-two 12 x 2, or 14 x 1, where a broadcast is
// part of the multiply-add but loads limit the speed.
#pragma once

#include "kernels/generic/activation.inl.h"
#include "kernels/generic/bf16.inl.h"

namespace {

// Where a tile's operands and results are; each tile moves it on to the next.
template <class T, class Y>
struct GemmPlace {
  const T* a;
  std::int64_t offset;  // of the first row, in y and the residual
  std::int64_t x;       // the first row's pixel within its line
  const Y* prefetch_dst;
};

// What a step of the inner dimension reads of operands of type T: `count` numbers of each row and column.
template <class T, int L>
struct InnerStep;

template <int L>
struct InnerStep<float, L> {
  static constexpr int count = 1;
  using Vector = F<L>;
  static EFFNET_INLINE Vector panel(const float* from) { return load<L>(from); }
  static EFFNET_INLINE Vector row(const float* from, bool) { return broadcast<L>(*from); }
  static EFFNET_INLINE F<L> add(F<L> to, Vector row, Vector panel) { return to + row * panel; }
};

template <int L>
struct InnerStep<Bf16, L> {
  static constexpr int count = 2;
  using Vector = U<L>;
  static EFFNET_INLINE Vector panel(const Bf16* from) { return load_pairs<L>(from); }
  // What follows an incomplete pair is not read: it may be a NaN.
  static EFFNET_INLINE Vector row(const Bf16* from, bool incomplete) {
    std::uint32_t pair = 0;
    memcpy(&pair, from, incomplete ? sizeof(Bf16) : sizeof pair);
    return U<L>{} + pair;
  }
  static EFFNET_INLINE F<L> add(F<L> to, Vector row, Vector panel) { return dot<L>(to, row, panel); }
};

// Numbers in a packed panel of the product's matrix.
template <class T, class Y>
std::int64_t panel_size(const effnet::Gemm<T, Y>& gemm) {
  constexpr int count = InnerStep<T, 1>::count;
  const std::int64_t steps = gemm.segments * ((gemm.segment_length + count - 1) / count) - gemm.k_tail_padding;
  return steps * count * effnet::panel_columns;
}

// What follows the product of a register tile: the activation, the residual, the sums; and the place of the next tile's
// results.
template <class T, class Y, int L, int Rows, int V>
EFFNET_INLINE void gemm_epilogue(const effnet::Gemm<T, Y>& gemm, std::int64_t column, F<L> (&sums)[Rows * V],
                                 GemmPlace<T, Y>& place) {
  activate<T, L, Rows * V>(sums, gemm.act);
  const std::int64_t begin = place.offset + column;
  // Where a vector of columns is in a row of y.
  const auto at = [&](auto v) EFFNET_INLINE_LAMBDA {
    constexpr int columns = effnet::panel_columns, first = decltype(v)::value * L;
    return first < columns ? first : gemm.y_panel + first - columns;
  };
  std::int64_t step = 0, x = place.x;
  if (gemm.residual == nullptr && gemm.y != nullptr && (gemm.gap == 0 || x + Rows <= gemm.width)) {
    // The common case: all rows are in one line, and there is no residual.
    Y* y = gemm.y + begin;
    unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA {
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA { store<L>(y + at(v), sums[r.value * V + v.value]); });
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
        if (gemm.residual != nullptr) value += load<L>(gemm.residual + begin + step + at(v));
        if (gemm.y != nullptr) store<L>(gemm.y + begin + step + at(v), value);
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
  place.offset += step;
  place.x = x;
}

template <class T, class Y, int L, int Rows, int V, int Chains = 1>
EFFNET_NOINLINE void gemm_tile(const effnet::Gemm<T, Y>& gemm, std::int64_t column, GemmPlace<T, Y>& place) {
  using Inner = InnerStep<T, L>;
  constexpr int columns = effnet::panel_columns, panels = (V * L + columns - 1) / columns;
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
  const std::int64_t stride = gemm.a_row, size = panel_size(gemm);
  const T* b = gemm.b + column * Inner::count;
  // The next panels are prefetched line by line while these are used, because weights are read once for a few rows and
  // are often not in cache.
  const std::intptr_t next_panel = static_cast<std::intptr_t>(sizeof(T)) * panels * size;
  // So are the next tile's rows, if they follow in memory.
  const T* next_rows = place.a + Rows * stride;
  for (std::int64_t segment = 0; segment < gemm.segments; ++segment) {
    const T* a[Pointers];
    unrolled<0, Pointers>(
        [&](auto p) EFFNET_INLINE_LAMBDA { a[p.value] = place.a + segment * gemm.a_segment + 3 * p.value * stride; });
    const auto multiply = [&](F<L>(&to)[Rows* V], bool incomplete) EFFNET_INLINE_LAMBDA {
      unrolled<0, panels>([&](auto p) EFFNET_INLINE_LAMBDA {
        const T* line = b + p.value * size;
        prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(line) + next_panel));
      });
      prefetch(next_rows);
      next_rows += Inner::count * Rows;
      typename Inner::Vector panel[V];
      unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
        constexpr int first = decltype(v)::value * L;
        panel[v.value] = Inner::panel(b + first / columns * size + first % columns * Inner::count);
      });
      unrolled<0, Rows>([&](auto r) EFFNET_INLINE_LAMBDA {
        const auto value = Inner::row(a[r.value / 3] + r.value % 3 * stride, incomplete);
        unrolled<0, V>([&](auto v) EFFNET_INLINE_LAMBDA {
          F<L>& sum = to[r.value * V + v.value];
          sum = Inner::add(sum, value, panel[v.value]);
        });
      });
      b += columns * Inner::count;
      unrolled<0, Pointers>([&](auto p) EFFNET_INLINE_LAMBDA { a[p.value] += Inner::count; });
    };
    const std::int64_t length =
        segment + 1 < gemm.segments ? gemm.segment_length : gemm.segment_length - gemm.k_tail_padding;
    std::int64_t k = length / Inner::count;
    for (; k >= Chains; k -= Chains) {
      multiply(sums, false);
      unrolled<1, Chains>([&](auto chain) EFFNET_INLINE_LAMBDA { multiply(more[chain.value], false); });
    }
    if constexpr (Chains > 1) {
      for (; k > 0; --k) multiply(sums, false);
    }
    if constexpr (Inner::count > 1) {
      if (length % Inner::count != 0) multiply(sums, true);
    }
  }
  unrolled<1, Chains>([&](auto chain) EFFNET_INLINE_LAMBDA {
    unrolled<0, Rows * V>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] += more[chain.value][i.value]; });
  });
  gemm_epilogue<T, Y, L, Rows, V>(gemm, column, sums, place);
  place.a += Rows * stride;
}

template <class T, class Y>
using GemmTile = void (*)(const effnet::Gemm<T, Y>&, std::int64_t, GemmPlace<T, Y>&);

template <class T, class Y, int L, int V, class Heights>
struct GemmTiles;
template <class T, class Y, int L, int V, int... Rows>
struct GemmTiles<T, Y, L, V, Integers<Rows...>> {
  static constexpr GemmTile<T, Y> of[] = {gemm_tile<T, Y, L, Rows, V>...};
};

// Columns [column, column + V * L) of the panels, by tiles of at most so many rows. Rows are divided into tiles of
// nearly equal height: 49 rows are seven tiles of 7, not six of 8 and one of 1.
template <int L, int V, int Most, class T, class Y>
void gemm_columns(const effnet::Gemm<T, Y>& gemm, std::int64_t column) {
  GemmPlace<T, Y> place{gemm.a, 0, 0, gemm.prefetch_dst};
  if (gemm.row_by_row) {
    for (std::int64_t row = 0; row < gemm.rows; ++row) gemm_tile<T, Y, L, 1, V, 8 / V>(gemm, column, place);
    return;
  }
  const std::int64_t tiles = (gemm.rows + Most - 1) / Most;
  std::int64_t left = gemm.rows;
  for (std::int64_t tile = tiles; tile > 0; --tile) {
    const std::int64_t rows = left / tile;
    GemmTiles<T, Y, L, V, typename UpTo<Most>::Type>::of[rows - 1](gemm, column, place);
    left -= rows;
  }
}

// Calls multiply(gemm of one panel) for each panel.
template <class T, class Y, class Function>
EFFNET_INLINE void each_panel(effnet::Gemm<T, Y> gemm, const Function& multiply) {
  constexpr std::int64_t width = effnet::panel_columns;
  const std::int64_t columns = gemm.columns;
  gemm.columns = columns < width ? columns : width;
  multiply(gemm);
  if (columns <= width) return;
  gemm.b += panel_size(gemm);
  gemm.bias += width;
  if (gemm.y != nullptr) gemm.y += gemm.y_panel;
  if (gemm.residual != nullptr) gemm.residual += gemm.y_panel;
  if (gemm.sums != nullptr) gemm.sums += width;
  gemm.columns = columns - width;
  multiply(gemm);
}

}  // namespace
