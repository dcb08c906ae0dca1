#include "kernels/generic/sixteen_lanes.inl.h"
#include "kernels/generic/table.inl.h"

namespace {

void weight_gradient_f32_8x2(const effnet::WeightGradient& call) {
  if (call.inputs > 24) return weight_gradient<16, 8, 2>(call);
  each_input_panel(call, [](const effnet::WeightGradient& panel) {
    if (panel.inputs > 8) {
      weight_gradient<16, 8, 1>(panel);
    } else {
      weight_gradient<8, 8, 1>(panel);
    }
  });
}

}  // namespace

const effnet::Kernels effnet::avx512_kernels = kernels_of_lanes<16>(
    "avx512", false, {gemm_12x2<float, float>, depthwise_row_16<float>, weight_gradient_f32_8x2, winograd_output_16});
