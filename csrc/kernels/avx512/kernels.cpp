#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_14x1(const effnet::Gemm& gemm) {
  if (gemm.columns > 8) {
    gemm_columns<16, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(gemm, 0);
  } else {
    // On a processor that issues two vectors of half the width at once, these cost half as much.
    gemm_columns<8, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(gemm, 0);
  }
}

void depthwise_row_f32_1x8(const effnet::DepthwiseRow& row) {
  if (row.channels > 8) {
    depthwise_row<16>(row);
  } else {
    depthwise_row<8>(row);
  }
}

void weight_gradient_f32_8x1(const effnet::WeightGradient& call) {
  if (call.inputs > 8) {
    weight_gradient<16, 8, 1>(call);
  } else {
    weight_gradient<8, 8, 1>(call);
  }
}

}  // namespace

const effnet::Kernels effnet::avx512_kernels =
    kernels_of_lanes<16>("avx512", false, {gemm_f32_14x1, depthwise_row_f32_1x8, weight_gradient_f32_8x1});
