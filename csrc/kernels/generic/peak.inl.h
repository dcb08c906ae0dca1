// Multiply-adds at the peak of the arithmetic units, to compare kernels with.
#pragma once

#include "kernels/generic/lanes.inl.h"

namespace {

constexpr int peak_chains = 12;

// rounds * 12 * L multiply-adds in registers, in enough independent chains to hide the latency of each.
template <int L>
float multiply_add(std::int64_t rounds) {
  F<L> sums[peak_chains];
  const F<L> factor = broadcast<L>(0.5f), term = broadcast<L>(1.0f);
  unrolled<0, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] = broadcast<L>(float(i.value)); });
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<0, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] = sums[i.value] * factor + term; });
  }
  float lanes[L], total = 0;
  unrolled<1, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[0] += sums[i.value]; });
  store<L>(lanes, sums[0]);
  for (const float lane : lanes) total += lane;
  return total;
}

}  // namespace
