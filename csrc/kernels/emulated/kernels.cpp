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

// What AMX's instructions compute, of tiles in memory: a product adds up the first numbers of all pairs, then the second
// ones, and adds both sums to the tile of sums. Denormal numbers count as zero throughout.
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
    const int rows = is_a ? shape_.rows : pairs(I);
    for (int row = 0; row < rows; ++row) {
      memcpy(operands_[I - amx_sums][row], from + row * row_bytes / std::int64_t{sizeof(Bf16)},
             sizeof(std::uint32_t) * (is_a ? pairs(I) : effnet::panel_columns));
    }
  }
  template <int Sums, int A, int B>
  void multiply() {
    for (int row = 0; row < shape_.rows; ++row) {
      F<16> first{}, second{};
      for (int pair = 0; pair < pairs(B); ++pair) {
        const U<16> a = U<16>{} + operands_[A - amx_sums][row][pair];
        U<16> b;
        memcpy(&b, operands_[B - amx_sums][pair], sizeof b);
        // The lower half of a pair is its first number; with zeros as the other, only its product is added.
        first = dot<16>(first, a << 16, b << 16);
        second = dot<16>(second, a & 0xffff0000u, b & 0xffff0000u);
      }
      const auto add = [](F<16> x, F<16> y) {
        return as_floats<16>(without_denormals<16>(as_bits<16>(x + y)));
      };
      store<16>(sums_[Sums][row], add(load<16>(sums_[Sums][row]), add(first, second)));
    }
  }
  template <int I>
  void store_tile(float* to) {
    memcpy(to, sums_[I], sizeof(float) * effnet::panel_columns * shape_.rows);
  }

 private:
  int pairs(int index) const { return index == amx_a || index == amx_b ? amx_pairs : shape_.last_pairs; }

  const AmxShape shape_;
  float sums_[amx_sums][amx_rows][effnet::panel_columns];
  std::uint32_t operands_[4][amx_rows][effnet::panel_columns];  // pairs
};

template <class Y>
void gemm_amx_or_3x4(const effnet::Gemm<Bf16, Y>& gemm) {
  if (suits_amx(gemm)) {
    gemm_amx<EmulatedAmx>(gemm);
  } else {
    gemm_16<3, 4>(gemm);
  }
}

constexpr effnet::MapKernels<Bf16> tile_kernels = {
    gemm_amx_or_3x4<Bf16>, gemm_amx_or_3x4<float>,        depthwise_row_16<Bf16>,      scale_rows<16, Bf16>,
    scale_panel<16>,       multiply_add_amx<EmulatedAmx>, multiply_adds_per_amx_round,
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
