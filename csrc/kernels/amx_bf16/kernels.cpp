// The matrix products for bfloat16 of processors with AMX.
#include "kernels/generic/gemm_amx.inl.h"

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

}  // namespace

void effnet::amx_bf16_gemm(const Gemm<Bf16>& gemm) {
  gemm_amx<Amx>(gemm, avx512_bf16_kernels.gemm_bias_act_residual_sum);
}
void effnet::amx_bf16_gemm_to_floats(const Gemm<Bf16, float>& gemm) {
  gemm_amx<Amx>(gemm, avx512_bf16_kernels.gemm_to_floats);
}
float effnet::amx_bf16_multiply_add(std::int64_t rounds) { return multiply_add_amx<Amx>(rounds); }
