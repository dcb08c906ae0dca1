#include "kernels/avx512/tiles.inl.h"
#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_12x2(const effnet::Gemm<float>& gemm) { gemm_avx512(gemm); }

void depthwise_row_f32_1x8(const effnet::DepthwiseRow<float>& row) { depthwise_row_avx512(row); }

void weight_gradient_f32_8x1(const effnet::WeightGradient& call) {
  if (call.inputs > 8) {
    weight_gradient<16, 8, 1>(call);
  } else {
    weight_gradient<8, 8, 1>(call);
  }
}

void winograd_output_f32(const effnet::WinogradOutput& call) {
  if (call.channels > 8) {
    winograd_output<16>(call);
  } else {
    winograd_output<8>(call);
  }
}

}  // namespace

const effnet::Kernels effnet::avx512_kernels = kernels_of_lanes<16>(
    "avx512", false, {gemm_f32_12x2, depthwise_row_f32_1x8, weight_gradient_f32_8x1, winograd_output_f32});
