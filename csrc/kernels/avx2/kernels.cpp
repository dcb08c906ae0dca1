#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_6x2(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    if (panel.columns > 8) {
      gemm_columns<8, 2, 6>(panel, 0);
    } else {
      gemm_columns<8, 1, 12>(panel, 0);
    }
  });
}

// Half as many inputs leave room for twice the outputs.
void weight_gradient_f32_4x2(const effnet::WeightGradient& call) {
  each_input_panel(call, [](const effnet::WeightGradient& panel) {
    if (panel.inputs > 8) {
      weight_gradient<8, 4, 2>(panel);
    } else {
      weight_gradient<8, 8, 1>(panel);
    }
  });
}

}  // namespace

const effnet::Kernels effnet::avx2_kernels = kernels_of_lanes<8>(
    "avx2", false, {gemm_f32_6x2, depthwise_row<8, float>, weight_gradient_f32_4x2, winograd_output<8>});
