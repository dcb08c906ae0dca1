// The loops with 4 and 16 lanes, compiled to the instructions of the architecture's baseline, so that their logic is
// tested on every machine.
#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_3x4(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    if (panel.columns > 8) {
      gemm_columns<4, 4, 1, 2, 3>(panel, 0);
    } else {
      gemm_columns<4, 2, 1, 2, 3>(panel, 0);
    }
  });
}

template <class T, class Y>
void gemm_3x2(const effnet::Gemm<T, Y>& gemm) {
  if (gemm.columns > 24) return gemm_columns<16, 2, 1, 2, 3>(gemm, 0);
  each_panel(gemm, [](const effnet::Gemm<T, Y>& panel) {
    if (panel.columns > 8) {
      gemm_columns<16, 1, 1, 2, 3, 4>(panel, 0);
    } else {
      gemm_columns<8, 1, 1, 2, 3, 4>(panel, 0);
    }
  });
}

template <class Y>
void depthwise_row_1x8(const effnet::DepthwiseRow<Y>& row) {
  if (row.channels > 8) {
    depthwise_row<16>(row);
  } else {
    depthwise_row<8>(row);
  }
}

void winograd_output_16(const effnet::WinogradOutput& call) {
  if (call.channels > 8) {
    winograd_output<16>(call);
  } else {
    winograd_output<8>(call);
  }
}

constexpr effnet::MapKernels<Bf16> bf16_kernels = {
    gemm_3x2<Bf16, Bf16>, gemm_3x2<Bf16, float>, depthwise_row_1x8<Bf16>, scale_rows<16, Bf16>,
    scale_panel<16>,      multiply_add_bf16<16>, 2 * 16 * peak_chains,
};

}  // namespace

const effnet::Kernels effnet::emulated4_kernels = kernels_of_lanes<4>(
    "emulated4", true, {gemm_f32_3x4, depthwise_row<4, float>, weight_gradient<4, 2, 4>, winograd_output<4>});

const effnet::Kernels effnet::emulated16_kernels = kernels_of_lanes<16>(
    "emulated16", true,
    {gemm_3x2<float, float>, depthwise_row_1x8<float>, weight_gradient<16, 2, 1>, winograd_output_16}, &bf16_kernels);
