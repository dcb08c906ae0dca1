#include "kernels/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "platform/cpu_features.h"

namespace effnet {
namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// A compiler that takes the flags of one of these instruction sets takes those of the ones before it, too: AVX-512,
// AVX512-BF16, AMX.
#if defined(EFFNET_HAVE_AVX512_BF16)
// The kernels of AVX-512 with others for bfloat16. Made here, because code that is compiled for an instruction set must
// not run where it is missing, not even to initialise a table.
Kernels avx512_with(const char* isa, const MapKernels<Bf16>& bf16) {
  Kernels kernels = avx512_kernels;
  kernels.isa = isa;
  kernels.bf16 = &bf16;
  return kernels;
}
#endif

#if defined(EFFNET_HAVE_AMX_BF16)
MapKernels<Bf16> with_amx(MapKernels<Bf16> kernels) {
  kernels.gemm_bias_act_residual_sum = amx_bf16_gemm;
  kernels.gemm_to_floats = amx_bf16_gemm_to_floats;
  kernels.multiply_add = amx_bf16_multiply_add;
  kernels.multiply_adds_per_round = amx_bf16_multiply_adds_per_round;
  return kernels;
}
#endif

}  // namespace

const std::vector<const Kernels*>& kernel_table() {
#if defined(EFFNET_HAVE_AVX512_BF16)
  static const Kernels avx512_bf16 = avx512_with("avx512_bf16", avx512_bf16_kernels);
#endif
#if defined(EFFNET_HAVE_AMX_BF16)
  static const MapKernels<Bf16> by_amx = with_amx(avx512_bf16_kernels);
  static const Kernels amx_bf16 = avx512_with("amx_bf16", by_amx);
#endif
  static const std::vector<const Kernels*> table = {
      &scalar_kernels,
#if defined(EFFNET_HAVE_EMULATED)
      &emulated4_kernels, &emulated16_kernels, &emulated_amx_kernels,
#endif
#if defined(EFFNET_HAVE_NEON)
      &neon_kernels,
#endif
#if defined(EFFNET_HAVE_AVX2)
      &avx2_kernels,
#endif
#if defined(EFFNET_HAVE_AVX512)
      &avx512_kernels,
#endif
#if defined(EFFNET_HAVE_AVX512_BF16)
      &avx512_bf16,
#endif
#if defined(EFFNET_HAVE_AMX_BF16)
      &amx_bf16,
#endif
  };
  return table;
}

bool isa_supported(const std::string& isa) {
  if (isa == "avx2") return cpu_features().avx2;
  if (isa == "avx512") return cpu_features().avx512;
  if (isa == "avx512_bf16") return cpu_features().avx512_bf16;
  if (isa == "amx_bf16") return cpu_features().amx_bf16;
  // Everything else that a build contains is the baseline of the architecture it was built for.
  return true;
}

std::string without_bf16(const std::string& isa) {
  return "expected an instruction set that multiplies in bfloat16 (avx512_bf16 or amx_bf16), got '" + isa +
         "'; this machine and build have " + joined(supported_isas());
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kernel_table()) {
    if (!kernels->emulated && isa_supported(kernels->isa)) names.push_back(kernels->isa);
  }
  return names;
}

const Kernels& kernels_of(const std::string& isa) {
  for (const Kernels* kernels : kernel_table()) {
    if (isa == kernels->isa && isa_supported(isa)) return *kernels;
  }
  throw std::invalid_argument("expected an instruction set out of " + joined(supported_isas()) + ", got '" + isa + "'");
}

const std::string& selected_isa() {
  static const std::string selected = [] {
    const std::vector<std::string> names = supported_isas();
    const char* forced = std::getenv("EFFNET_KERNELS_ISA");
    if (forced == nullptr || *forced == '\0') return names.back();
    for (const std::string& name : names) {
      if (name == forced) return name;
    }
    throw std::invalid_argument("EFFNET_KERNELS_ISA: expected one of " + joined(names) +
                                " (this machine supports them and this build contains them), got '" + forced + "'");
  }();
  return selected;
}

}  // namespace effnet
