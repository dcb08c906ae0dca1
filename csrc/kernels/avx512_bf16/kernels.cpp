// The kernels for bfloat16 of processors with AVX512-BF16.
#include "kernels/generic/elementwise.inl.h"
#include "kernels/generic/peak.inl.h"
#include "kernels/generic/sixteen_lanes.inl.h"

const effnet::MapKernels<effnet::Bf16> effnet::avx512_bf16_kernels = {
    gemm_12x2<Bf16, Bf16>, gemm_12x2<Bf16, float>, depthwise_row_16<Bf16>, scale_rows<16, Bf16>,
    scale_panel<16>,       multiply_add_bf16<16>,  2 * 16 * peak_chains,
};
