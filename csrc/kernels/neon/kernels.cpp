#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_5x4(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    if (panel.columns > 8) {
      gemm_columns<4, 4, 5>(panel, 0);
    } else {
      gemm_columns<4, 2, 8>(panel, 0);
    }
  });
}

}  // namespace

const effnet::Kernels effnet::neon_kernels = kernels_of_lanes<4>(
    "neon", false, {gemm_f32_5x4, depthwise_row<4, float>, weight_gradient<4, 4, 4>, winograd_output<4>});
