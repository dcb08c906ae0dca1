#include "platform/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#define EFFNET_X86_64 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace effnet {
namespace {

#if defined(EFFNET_X86_64)

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {static_cast<unsigned>(out[0]), static_cast<unsigned>(out[1]), static_cast<unsigned>(out[2]),
          static_cast<unsigned>(out[3])};
#else
  Registers r{0, 0, 0, 0};
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
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

// Asks the operating system to save AMX's tile registers. Linux does so only for processes that asked for it, before
// their first tile instruction.
bool tiles_allowed() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool bit(unsigned value, int index) { return (value >> index & 1u) != 0; }

CpuFeatures detect() {
  CpuFeatures features;
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
  // The register eax of leaf 7 is the number of its last subleaf.
  features.avx512_bf16 = features.avx512 && extended.eax >= 1 && bit(cpuid(7, 1).eax, 5);
  const bool tiles = (state & 0x60000u) == 0x60000u;
  features.amx_bf16 =
      features.avx512_bf16 && tiles && bit(extended.edx, 22) && bit(extended.edx, 24) && tiles_allowed();
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace effnet
