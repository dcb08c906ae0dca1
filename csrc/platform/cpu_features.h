// The instruction sets beyond the architecture's baseline that this machine can run.
#pragma once

namespace effnet {

struct CpuFeatures {
  bool avx2 = false;    // with FMA
  bool avx512 = false;  // F, DQ, BW and VL
  bool avx512_bf16 = false;
  bool amx_bf16 = false;  // with AVX512-BF16
};

// What both the processor and the operating system support; found out once.
const CpuFeatures& cpu_features();

}  // namespace effnet
