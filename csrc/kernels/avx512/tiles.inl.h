// The register tiles for thirty-two registers of 16 lanes, in both types of numbers.
#pragma once

#include "kernels/generic/depthwise_row.inl.h"
#include "kernels/generic/gemm.inl.h"

namespace {

// Half as wide vectors cost half as much on a processor that issues two of them at once.
template <class T, class Y>
void gemm_avx512(const effnet::Gemm<T, Y>& gemm) {
  if (gemm.columns > 24) return gemm_columns<16, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>(gemm, 0);
  each_panel(gemm, [](const effnet::Gemm<T, Y>& panel) {
    if (panel.columns > 8) {
      gemm_columns<16, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(panel, 0);
    } else {
      gemm_columns<8, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(panel, 0);
    }
  });
}

template <class Y>
void depthwise_row_avx512(const effnet::DepthwiseRow<Y>& row) {
  if (row.channels > 8) {
    depthwise_row<16>(row);
  } else {
    depthwise_row<8>(row);
  }
}

}  // namespace
