// Multiply-adds at the peak of the arithmetic units, to compare kernels with.
#pragma once

#include "kernels/generic/bf16.inl.h"

namespace {

// Enough independent chains to hide the latency of each.
constexpr int peak_chains = 12;

template <int L, class Step>
EFFNET_INLINE float multiply_add_chains(std::int64_t rounds, const Step& step) {
  F<L> sums[peak_chains];
  unrolled<0, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] = broadcast<L>(float(i.value)); });
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<0, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[i.value] = step(sums[i.value]); });
  }
  float lanes[L], total = 0;
  unrolled<1, peak_chains>([&](auto i) EFFNET_INLINE_LAMBDA { sums[0] += sums[i.value]; });
  store<L>(lanes, sums[0]);
  for (const float lane : lanes) total += lane;
  return total;
}

template <int L>
float multiply_add(std::int64_t rounds) {
  const F<L> factor = broadcast<L>(0.5f), term = broadcast<L>(1.0f);
  return multiply_add_chains<L>(rounds, [&](F<L> sum) EFFNET_INLINE_LAMBDA { return sum * factor + term; });
}

template <int L>
float multiply_add_bf16(std::int64_t rounds) {
  // Pairs of one half, whose products the compiler must not know.
  static const volatile std::uint32_t half = 0x3f003f00u;
  const U<L> pairs = U<L>{} + half;
  return multiply_add_chains<L>(rounds, [&](F<L> sum) EFFNET_INLINE_LAMBDA { return dot<L>(sum, pairs, pairs); });
}

}  // namespace
