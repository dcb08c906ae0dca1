#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_2x4(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    for (std::int64_t column = 0; column < panel.columns; column += 4) gemm_columns<1, 4, 2>(panel, column);
  });
}

}  // namespace

const effnet::Kernels effnet::scalar_kernels = kernels_of_lanes<1>(
    "scalar", false, {gemm_f32_2x4, depthwise_row<1, float>, weight_gradient<1, 2, 4>, winograd_output<1>});
