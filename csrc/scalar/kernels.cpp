#include "../generic/depthwise_row.inl.h"
#include "../generic/elementwise.inl.h"
#include "../generic/gemm.inl.h"
#include "../generic/peak.inl.h"

namespace {

void gemm_f32_2x4(const effnet::Gemm& gemm) {
  for (std::int64_t column = 0; column < gemm.columns; column += 4) gemm_columns<1, 4, 1, 2>(gemm, column);
}

}  // namespace

const effnet::Kernels effnet::scalar_kernels = {
    "scalar", 1, false, gemm_f32_2x4, depthwise_row<1>, gate<1>, scale_rows<1>, scale_panel<1>, multiply_add<1>, peak_chains,
};
