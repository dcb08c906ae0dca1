// The loops with 4 and 16 lanes, compiled to the instructions of the architecture's baseline, so that their logic is
// tested on every machine.
#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_3x4(const effnet::Gemm& gemm) {
  if (gemm.columns > 8) {
    gemm_columns<4, 4, 1, 2, 3>(gemm, 0);
  } else {
    gemm_columns<4, 2, 1, 2, 3>(gemm, 0);
  }
}

void gemm_f32_4x1(const effnet::Gemm& gemm) {
  if (gemm.columns > 8) {
    gemm_columns<16, 1, 1, 2, 3, 4>(gemm, 0);
  } else {
    gemm_columns<8, 1, 1, 2, 3, 4>(gemm, 0);
  }
}

void depthwise_row_f32_1x8(const effnet::DepthwiseRow& row) {
  if (row.channels > 8) {
    depthwise_row<16>(row);
  } else {
    depthwise_row<8>(row);
  }
}

}  // namespace

const effnet::Kernels effnet::emulated4_kernels =
    kernels_of_lanes<4>("emulated4", true, {gemm_f32_3x4, depthwise_row<4>, weight_gradient<4, 2, 4>});

const effnet::Kernels effnet::emulated16_kernels =
    kernels_of_lanes<16>("emulated16", true, {gemm_f32_4x1, depthwise_row_f32_1x8, weight_gradient<16, 2, 1>});
