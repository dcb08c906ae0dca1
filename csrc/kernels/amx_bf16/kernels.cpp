// The kernels for bfloat16 of processors with AMX, which multiplies matrices of it.
#include "kernels/generic/elementwise.inl.h"
#include "kernels/generic/gemm_amx.inl.h"
#include "kernels/generic/sixteen_lanes.inl.h"

namespace {

// The tile registers of this thread while the object lives. The instructions are written out, because the compilers'
// intrinsics take no template arguments for registers, and some do not say what memory they read.
class Amx {
 public:
  explicit Amx(const AmxShape& shape) {
    // The operand of ldtilecfg.
    struct {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t row_bytes[16];
      std::uint8_t rows[16];
    } config = {};
    const auto set = [&](int index, int rows, int bytes) {
      config.rows[index] = static_cast<std::uint8_t>(rows);
      config.row_bytes[index] = static_cast<std::uint16_t>(bytes);
    };
    constexpr int pair = 2 * sizeof(Bf16), row = effnet::panel_columns * pair;
    config.palette = 1;
    for (int i = 0; i < amx_sums; ++i) set(i, shape.rows, row);
    set(amx_a, shape.rows, amx_pairs * pair);
    set(amx_b, amx_pairs, row);
    if (shape.last_pairs > 0) {
      set(amx_last_a, shape.rows, shape.last_pairs * pair);
      set(amx_last_b, shape.last_pairs, row);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  // Gives the registers up: as long as they hold something, every switch of threads saves them.
  ~Amx() { asm volatile("tilerelease"); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  template <int I>
  EFFNET_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(I));
  }
  template <int I>
  EFFNET_INLINE void load_tile(const Bf16* from, std::int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(I) : "memory");
  }
  template <int Sums, int A, int B>
  EFFNET_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
  }
  template <int I>
  EFFNET_INLINE void store_tile(float* to) {
    constexpr std::int64_t row_bytes = effnet::panel_columns * sizeof(float);
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(I) : "memory");
  }
};

template <class Y>
void gemm(const effnet::Gemm<Bf16, Y>& call) {
  if (suits_amx(call)) {
    gemm_amx<Amx>(call);
  } else {
    gemm_12x2(call);
  }
}

}  // namespace

const effnet::MapKernels<effnet::Bf16> effnet::amx_bf16_kernels = {
    gemm<Bf16>,
    gemm<float>,
    depthwise_row_16<Bf16>,
    scale_rows<16, Bf16>,
    scale_panel<16>,
    multiply_add_amx<Amx>,
    multiply_adds_per_amx_round,
};
