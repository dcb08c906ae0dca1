#include "../generic/depthwise_row.inl.h"
#include "../generic/elementwise.inl.h"
#include "../generic/gemm.inl.h"
#include "../generic/peak.inl.h"

namespace {

void gemm_f32_5x4(const effnet::Gemm& gemm) {
  if (gemm.columns > 8) {
    gemm_columns<4, 4, 1, 2, 3, 4, 5>(gemm, 0);
  } else {
    gemm_columns<4, 2, 1, 2, 3, 4, 5, 6, 7, 8>(gemm, 0);
  }
}

}  // namespace

const effnet::Kernels effnet::neon_kernels = {
    "neon", 4, false, gemm_f32_5x4, depthwise_row<4>, gate<4>, scale_rows<4>, scale_panel<4>, multiply_add<4>, peak_chains,
};
