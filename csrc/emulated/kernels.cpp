// The 4- and 16-lane loops lowered to whatever the baseline has, so that their logic is tested on every machine.
#include "../generic/depthwise_row.inl.h"
#include "../generic/elementwise.inl.h"
#include "../generic/gemm.inl.h"
#include "../generic/peak.inl.h"

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

const effnet::Kernels effnet::emulated4_kernels = {
    "emulated4", 4, true, gemm_f32_3x4, depthwise_row<4>, gate<4>, scale_rows<4>, scale_panel<4>, multiply_add<4>, peak_chains,
};

const effnet::Kernels effnet::emulated16_kernels = {
    "emulated16", 16, true, gemm_f32_4x1, depthwise_row_f32_1x8, gate<16>, scale_rows<16>, scale_panel<16>, multiply_add<16>, peak_chains,
};
