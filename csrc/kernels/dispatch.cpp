#include "kernels/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#define EFFNET_X86_64 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace effnet {
namespace {

struct Features {
  bool avx2 = false;
  bool avx512 = false;
};

#if defined(EFFNET_X86_64)

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf) {
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), 0);
  return {static_cast<unsigned>(out[0]), static_cast<unsigned>(out[1]), static_cast<unsigned>(out[2]),
          static_cast<unsigned>(out[3])};
#else
  Registers r{0, 0, 0, 0};
  __cpuid_count(leaf, 0, r.eax, r.ebx, r.ecx, r.edx);
  return r;
#endif
}

// The register sets that the operating system saves: a processor may have AVX under a system that does not.
unsigned enabled_state() {
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool bit(unsigned value, int index) { return (value >> index & 1u) != 0; }

Features detect() {
  Features features;
  if (cpuid(0).eax < 7) return features;
  const Registers basic = cpuid(1);
  const Registers extended = cpuid(7);
  const bool os_saves = bit(basic.ecx, 27);
  if (!os_saves) return features;
  const unsigned state = enabled_state();
  const bool ymm = (state & 0x06u) == 0x06u;
  const bool zmm = (state & 0xe6u) == 0xe6u;
  const bool fma = bit(basic.ecx, 12), avx = bit(basic.ecx, 28);
  features.avx2 = ymm && avx && fma && bit(extended.ebx, 5);
  const bool avx512_f_dq_bw_vl =
      bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) && bit(extended.ebx, 31);
  features.avx512 = features.avx2 && zmm && avx512_f_dq_bw_vl;
  return features;
}

#else

Features detect() { return {}; }

#endif

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const std::vector<const Kernels*>& kernel_table() {
  static const std::vector<const Kernels*> table = {
      &scalar_kernels,
#if defined(EFFNET_HAVE_EMULATED)
      &emulated4_kernels,
      &emulated16_kernels,
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
  };
  return table;
}

bool isa_supported(const std::string& isa) {
  static const Features features = detect();
  if (isa == "avx2") return features.avx2;
  if (isa == "avx512") return features.avx512;
  // What else a build contains is the baseline of the architecture it was built for.
  return true;
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
