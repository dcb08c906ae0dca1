// The loops with 4 and 16 lanes, compiled to the instructions of the architecture's baseline, so that their logic is
// tested on every machine.
#include "kernels/generic/gemm_amx.inl.h"
#include "kernels/generic/sixteen_lanes.inl.h"
#include "kernels/generic/table.inl.h"

namespace {

void gemm_f32_3x4(const effnet::Gemm<float>& gemm) {
  each_panel(gemm, [](const effnet::Gemm<float>& panel) {
    if (panel.columns > 8) {
      gemm_columns<4, 4, 3>(panel, 0);
    } else {
      gemm_columns<4, 2, 3>(panel, 0);
    }
  });
}

constexpr effnet::MapKernels<Bf16> bf16_kernels = {
    gemm_16<3, 4, Bf16, Bf16>, gemm_16<3, 4, Bf16, float>, depthwise_row_16<Bf16>, scale_rows<16, Bf16>,
    scale_panel<16>,           multiply_add_bf16<16>,      2 * 16 * peak_chains,
};

// What AMX's instructions compute, of tiles in memory: a product adds up the first numbers of all pairs, then the
// second ones, and adds both sums to the tile of sums. Denormal numbers count as zero throughout.
class EmulatedAmx {
 public:
  explicit EmulatedAmx(const AmxShape& shape) : shape_(shape) {}

  template <int I>
  void zero() {
    memset(sums_[I], 0, sizeof sums_[I]);
  }
  template <int I>
  void load_tile(const Bf16* from, std::int64_t row_bytes) {
    const bool is_a = I == amx_a || I == amx_last_a;
    load_rows(operands_[I - amx_sums], from, row_bytes, is_a ? shape_.rows : pairs(I), is_a ? pairs(I) : amx_rows);
  }
  template <int Sums, int A, int B>
  void multiply() {
    multiply_rows(sums_[Sums], operands_[A - amx_sums], operands_[B - amx_sums], pairs(B));
  }
  template <int I>
  void store_tile(float* to) {
    memcpy(to, sums_[I], sizeof(float) * effnet::panel_columns * shape_.rows);
  }

 private:
  using Floats = float[amx_rows][effnet::panel_columns];
  using Pairs = std::uint32_t[amx_rows][amx_pairs];

  int pairs(int index) const { return index == amx_a || index == amx_b ? amx_pairs : shape_.last_pairs; }

  EFFNET_NOINLINE static void load_rows(Pairs& to, const Bf16* from, std::int64_t row_bytes, int rows, int pairs) {
    for (int row = 0; row < rows; ++row) {
      const Bf16* begin = from + row * row_bytes / std::int64_t{sizeof(Bf16)};
      memcpy(to[row], begin, sizeof(std::uint32_t) * static_cast<std::size_t>(pairs));
    }
  }

  EFFNET_NOINLINE void multiply_rows(Floats& sums, const Pairs& a, const Pairs& b, int pairs) const {
    const auto add = [](F<16> x, F<16> y) { return as_floats<16>(without_denormals<16>(as_bits<16>(x + y))); };
    for (int row = 0; row < shape_.rows; ++row) {
      F<16> first{}, second{};
      for (int pair = 0; pair < pairs; ++pair) {
        const U<16> left = U<16>{} + a[row][pair];
        U<16> right;
        memcpy(&right, b[pair], sizeof right);
        // The lower half of a pair is its first number; with zeros as the other, only its product is added.
        first = dot<16>(first, left << 16, right << 16);
        second = dot<16>(second, left & 0xffff0000u, right & 0xffff0000u);
      }
      store<16>(sums[row], add(load<16>(sums[row]), add(first, second)));
    }
  }

  const AmxShape shape_;
  Floats sums_[amx_sums];
  Pairs operands_[4];
};

template <class Y>
void gemm_by_tiles(const effnet::Gemm<Bf16, Y>& gemm) {
  gemm_amx<EmulatedAmx>(gemm, gemm_16<3, 4, Bf16, Y>);
}

constexpr effnet::MapKernels<Bf16> tile_kernels = {
    gemm_by_tiles<Bf16>,
    gemm_by_tiles<float>,
    depthwise_row_16<Bf16>,
    scale_rows<16, Bf16>,
    scale_panel<16>,
    multiply_add_amx<EmulatedAmx>,
    effnet::amx_bf16_multiply_adds_per_round,
};

constexpr Tiles sixteen_lanes = {gemm_16<3, 4, float, float>, depthwise_row_16<float>, weight_gradient<16, 2, 1>,
                                 winograd_output_16};

}  // namespace

const effnet::Kernels effnet::emulated4_kernels = kernels_of_lanes<4>(
    "emulated4", true, {gemm_f32_3x4, depthwise_row<4, float>, weight_gradient<4, 2, 4>, winograd_output<4>});

const effnet::Kernels effnet::emulated16_kernels =
    kernels_of_lanes<16>("emulated16", true, sixteen_lanes, &bf16_kernels);

const effnet::Kernels effnet::emulated_amx_kernels =
    kernels_of_lanes<16>("emulated_amx", true, sixteen_lanes, &tile_kernels);
