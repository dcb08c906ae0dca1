// The matrix product of bfloat16 numbers by AMX: a unit that multiplies matrices of up to 16 rows in tile registers.
//
// A tile of sums is 16 rows by 16 columns. Each step of the inner dimension loads a tile of 16 rows by up to 16 pairs
// of numbers from `a`, and one of as many pairs by 16 columns from a packed panel, which is laid out as the unit reads
// it. Four tiles of sums hide the latency of a product: two by two of them for two panels, four by one for one panel.
#pragma once

#include "kernels/generic/gemm.inl.h"

namespace {

constexpr int amx_rows = 16;   // of a tile
constexpr int amx_pairs = 16;  // of a row of a tile
constexpr int amx_sums = 4;    // tiles of sums, which are the first registers

// The other tile registers. Those of a segment's last step hold the pairs that are left.
enum AmxRegister { amx_a = amx_sums, amx_b, amx_last_a, amx_last_b };

// What the tile registers are configured for.
struct AmxShape {
  int rows;        // of the sums and of `a`
  int last_pairs;  // of a segment's last step; 0 where the other steps cover the segment
};

template <int L, int Rows, class Y>
EFFNET_NOINLINE void amx_epilogue(const effnet::Gemm<Bf16, Y>& panel, const float* from, GemmPlace<Bf16, Y>& place) {
  F<L> sums[Rows];
  const F<L> bias = load<L>(panel.bias);
  unrolled<0, Rows>(
      [&](auto r) EFFNET_INLINE_LAMBDA { sums[r.value] = load<L>(from + r.value * effnet::panel_columns) + bias; });
  gemm_epilogue<Bf16, Y, L, Rows, 1>(panel, 0, sums, place);
}

template <int L, class Y>
void amx_epilogues(const effnet::Gemm<Bf16, Y>& panel, const float* from, std::int64_t rows,
                   GemmPlace<Bf16, Y>& place) {
  constexpr int most = 8;
  for (; rows >= most; rows -= most, from += most * effnet::panel_columns) amx_epilogue<L, most>(panel, from, place);
  for (; rows > 0; --rows, from += effnet::panel_columns) amx_epilogue<L, 1>(panel, from, place);
}

using AmxSums = float[amx_sums][amx_rows * effnet::panel_columns];

// The first row of a tile of the block that begins at `begin`. The last tile ends where the product's rows end: what it
// has in common with the tile before it is computed twice and stored once.
template <class Y>
std::int64_t amx_first_row(const effnet::Gemm<Bf16, Y>& gemm, const AmxShape& shape, std::int64_t begin, int tile) {
  const std::int64_t wanted = begin + tile * amx_rows, last = gemm.rows - shape.rows;
  return wanted < last ? wanted : last;
}

// The sums of a block of Height tiles of rows by N panels.
template <class Amx, int Height, int N, class Y>
EFFNET_NOINLINE void amx_products(Amx& amx, const AmxShape& shape, const effnet::Gemm<Bf16, Y> (&panels)[N],
                                  std::int64_t begin, AmxSums& sums) {
  const effnet::Gemm<Bf16, Y>& gemm = panels[0];
  const Bf16 *a[Height], *b[N];
  unrolled<0, Height>([&](auto h) EFFNET_INLINE_LAMBDA {
    a[h.value] = gemm.a + amx_first_row(gemm, shape, begin, h.value) * gemm.a_row;
  });
  unrolled<0, N>([&](auto n) EFFNET_INLINE_LAMBDA { b[n.value] = panels[n.value].b; });
  unrolled<0, Height * N>([&](auto i) EFFNET_INLINE_LAMBDA { amx.template zero<i.value>(); });
  // Panels are read in turn from the first to the last and back, so that one is loaded twice as seldom.
  const auto multiply = [&](auto register_a, auto register_b, int pairs) EFFNET_INLINE_LAMBDA {
    constexpr int A = decltype(register_a)::value, B = decltype(register_b)::value;
    unrolled<0, Height * N>([&](auto i) EFFNET_INLINE_LAMBDA {
      constexpr int h = decltype(i)::value / N, turn = decltype(i)::value % N;
      constexpr int n = h % 2 == 0 ? turn : N - 1 - turn;
      if constexpr (turn == 0) amx.template load_tile<A>(a[h], gemm.a_row * std::int64_t{sizeof(Bf16)});
      if constexpr (h == 0 || turn > 0) {
        amx.template load_tile<B>(b[n], 2 * effnet::panel_columns * std::int64_t{sizeof(Bf16)});
      }
      amx.template multiply<h * N + n, A, B>();
    });
    unrolled<0, Height>([&](auto h) EFFNET_INLINE_LAMBDA { a[h.value] += 2 * pairs; });
    unrolled<0, N>([&](auto n) EFFNET_INLINE_LAMBDA { b[n.value] += 2 * pairs * effnet::panel_columns; });
  };
  const std::int64_t steps = gemm.segment_length / (2 * amx_pairs);
  for (std::int64_t segment = 0; segment < gemm.segments; ++segment) {
    for (std::int64_t step = 0; step < steps; ++step) multiply(Index<amx_a>{}, Index<amx_b>{}, amx_pairs);
    if (shape.last_pairs > 0) multiply(Index<amx_last_a>{}, Index<amx_last_b>{}, shape.last_pairs);
    unrolled<0, Height>([&](auto h) EFFNET_INLINE_LAMBDA { a[h.value] += gemm.a_segment - gemm.segment_length; });
  }
  unrolled<0, Height * N>([&](auto i) EFFNET_INLINE_LAMBDA { amx.template store_tile<i.value>(sums[i.value]); });
}

// The results of rows [begin, end), a block's.
template <int N, class Y>
void amx_results(const AmxShape& shape, const effnet::Gemm<Bf16, Y> (&panels)[N], std::int64_t begin, std::int64_t end,
                 const AmxSums& sums, GemmPlace<Bf16, Y>& place) {
  const GemmPlace<Bf16, Y> first_place = place;
  for (int n = 0; n < N; ++n) {
    place = first_place;
    std::int64_t row = begin;
    for (int h = 0; row < end; ++h) {
      const std::int64_t first = amx_first_row(panels[0], shape, begin, h);
      const std::int64_t tile_end = first + shape.rows < end ? first + shape.rows : end;
      const float* from = sums[h * N + n] + (row - first) * effnet::panel_columns;
      if (panels[n].columns > 8) {
        amx_epilogues<16>(panels[n], from, tile_end - row, place);
      } else {
        amx_epilogues<8>(panels[n], from, tile_end - row, place);
      }
      row = tile_end;
    }
  }
}

// All rows of N panels, in blocks of as many tiles as there are registers for their sums.
template <class Amx, int N, class Y>
void amx_blocks(const effnet::Gemm<Bf16, Y> (&panels)[N]) {
  constexpr int height = amx_sums / N;
  const std::int64_t rows = panels[0].rows;
  const AmxShape shape{rows < amx_rows ? static_cast<int>(rows) : amx_rows,
                       static_cast<int>(panels[0].segment_length / 2 % amx_pairs)};
  Amx amx(shape);
  GemmPlace<Bf16, Y> place{nullptr, 0, 0, nullptr};
  alignas(64) AmxSums sums;
  for (std::int64_t begin = 0; begin < rows; begin += height * amx_rows) {
    // The last block has the least height that covers its rows.
    const std::int64_t end = begin + height * amx_rows < rows ? begin + height * amx_rows : rows;
    const std::int64_t tiles = (end - begin + amx_rows - 1) / amx_rows;
    unrolled<1, height + 1>([&](auto h) EFFNET_INLINE_LAMBDA {
      if (tiles == h.value) amx_products<Amx, h.value>(amx, shape, panels, begin, sums);
    });
    amx_results(shape, panels, begin, end, sums, place);
  }
}

// The product by the unit, or by `other` where a segment ends in half a pair, behind which the unit would read, or
// where rows are computed one at a time.
template <class Amx, class Y>
void gemm_amx(const effnet::Gemm<Bf16, Y>& gemm, void (*other)(const effnet::Gemm<Bf16, Y>&)) {
  if (gemm.segment_length % 2 != 0 || gemm.row_by_row) return other(gemm);
  effnet::Gemm<Bf16, Y> panels[2];
  int count = 0;
  each_panel(gemm, [&](const effnet::Gemm<Bf16, Y>& panel) { panels[count++] = panel; });
  if (count == 2) return amx_blocks<Amx>(panels);
  const effnet::Gemm<Bf16, Y> panel[1] = {panels[0]};
  amx_blocks<Amx>(panel);
}

// Products at the peak of the unit; each round has as many as there are tiles of sums.
template <class Amx>
float multiply_add_amx(std::int64_t rounds) {
  alignas(64) float sums[amx_rows * effnet::panel_columns] = {};
  Amx amx(AmxShape{amx_rows, 0});
  unrolled<0, amx_sums>([&](auto i) EFFNET_INLINE_LAMBDA { amx.template zero<i.value>(); });
  amx.template load_tile<amx_a>(reinterpret_cast<const Bf16*>(sums), 64);
  amx.template load_tile<amx_b>(reinterpret_cast<const Bf16*>(sums), 64);
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<0, amx_sums>([&](auto i) EFFNET_INLINE_LAMBDA { amx.template multiply<i.value, amx_a, amx_b>(); });
  }
  amx.template store_tile<0>(sums);
  return sums[0];
}

static_assert(effnet::amx_bf16_multiply_adds_per_round == amx_sums * amx_rows * 2 * amx_pairs * effnet::panel_columns,
              "the products of a round");

}  // namespace
