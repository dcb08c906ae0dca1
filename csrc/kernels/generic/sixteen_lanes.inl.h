// Loops of 16 lanes, with 8 for panels that have no more columns: vectors of half the width cost half as much on a
// processor that issues two of them at once.
#pragma once

#include "kernels/generic/depthwise_row.inl.h"
#include "kernels/generic/gemm.inl.h"
#include "kernels/generic/winograd.inl.h"

namespace {

// Register tiles of at most PairRows rows of two panels, and of PanelRows of one.
template <int PairRows, int PanelRows, class T, class Y>
void gemm_16(const effnet::Gemm<T, Y>& gemm) {
  if (gemm.columns > 24) return gemm_columns<16, 2, PairRows>(gemm, 0);
  each_panel(gemm, [](const effnet::Gemm<T, Y>& panel) {
    if (panel.columns > 8) {
      gemm_columns<16, 1, PanelRows>(panel, 0);
    } else {
      gemm_columns<8, 1, PanelRows>(panel, 0);
    }
  });
}

// What fits in thirty-two registers.
template <class T, class Y>
void gemm_12x2(const effnet::Gemm<T, Y>& gemm) {
  gemm_16<largest_tile(12, 3), largest_tile(14, 4)>(gemm);
}

template <class Y>
void depthwise_row_16(const effnet::DepthwiseRow<Y>& row) {
  if (row.channels > 8) {
    depthwise_row<16>(row);
  } else {
    depthwise_row<8>(row);
  }
}

inline void winograd_output_16(const effnet::WinogradOutput& call) {
  if (call.channels > 8) {
    winograd_output<16>(call);
  } else {
    winograd_output<8>(call);
  }
}

}  // namespace
