// The loops with 4 and 16 lanes, compiled to the instructions of the architecture's baseline, so that their logic is
// tested on every machine.
#include "kernels/generic/sixteen_lanes.inl.h"
#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_3x4(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    if (panel.columns > 8) {
      gemm_columns<4, 4, 3>(panel, 0);
    } else {
      gemm_columns<4, 2, 3>(panel, 0);
    }
  });
}

constexpr effnet::MapKernels<Bf16> bf16_kernels = {
    gemm_16<3, 4, Bf16, Bf16>, gemm_16<3, 4, Bf16, float>, depthwise_row_16<Bf16>, scale_rows<16, Bf16>,
    scale_panel<16>,           multiply_add_bf16<16>,      2 * 16 * peak_chains,
};

}  // namespace

const effnet::Kernels effnet::emulated4_kernels = kernels_of_lanes<4>(
    "emulated4", true, {gemm_f32_3x4, depthwise_row<4, float>, weight_gradient<4, 2, 4>, winograd_output<4>});

const effnet::Kernels effnet::emulated16_kernels = kernels_of_lanes<16>(
    "emulated16", true,
    {gemm_16<3, 4, float, float>, depthwise_row_16<float>, weight_gradient<16, 2, 1>, winograd_output_16},
    &bf16_kernels);
