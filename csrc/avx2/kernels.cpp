#include "../generic/depthwise_row.inl.h"
#include "../generic/elementwise.inl.h"
#include "../generic/gemm.inl.h"
#include "../generic/peak.inl.h"

namespace {

void gemm_f32_6x2(const effnet::Gemm& gemm) {
  if (gemm.columns > 8) {
    gemm_columns<8, 2, 1, 2, 3, 4, 5, 6>(gemm, 0);
  } else {
    gemm_columns<8, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>(gemm, 0);
  }
}

}  // namespace

const effnet::Kernels effnet::avx2_kernels = {
    "avx2", 8, false, gemm_f32_6x2, depthwise_row<8>, gate<8>, scale_rows<8>, scale_panel<8>, multiply_add<8>, peak_chains,
};
