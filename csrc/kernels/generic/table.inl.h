// Makes a row of the table of kernels: all loops with L lanes, and those loops whose register tiles an instruction set
// chooses as they are given.
#pragma once

#include "kernels/generic/depthwise_row.inl.h"
#include "kernels/generic/elementwise.inl.h"
#include "kernels/generic/gemm.inl.h"
#include "kernels/generic/hash.inl.h"
#include "kernels/generic/peak.inl.h"
#include "kernels/generic/prologue.inl.h"
#include "kernels/generic/weight_gradient.inl.h"
#include "kernels/generic/winograd.inl.h"

namespace {

struct Tiles {
  void (*gemm)(const effnet::Gemm<float>&);
  void (*depthwise_row)(const effnet::DepthwiseRow<float>&);
  void (*weight_gradient)(const effnet::WeightGradient&);
  void (*winograd_output)(const effnet::WinogradOutput&);
};

template <int L>
constexpr effnet::Kernels kernels_of_lanes(const char* isa, bool emulated, const Tiles& tiles,
                                           const effnet::MapKernels<Bf16>* bf16 = nullptr) {
  return {
      isa,
      L,
      emulated,
      {tiles.gemm, tiles.gemm, tiles.depthwise_row, scale_rows<L, float>, scale_panel<L>, multiply_add<L>,
       peak_chains * L},
      bf16,
      winograd_input<L>,
      tiles.winograd_output,
      gate<L>,
      activate_rows<L>,
      gradient_rows<L>,
      act_grad_panel<L>,
      panel_statistics<L>,
      panel_sums<L>,
      tiles.weight_gradient,
      depthwise_weight_gradient<L>,
      hash,
  };
}

}  // namespace
