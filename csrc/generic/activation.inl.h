// Activations of T vectors at a time, so that T independent chains hide the latency of one, and their parts.
#pragma once

#include "../kernels.h"
#include "lanes.inl.h"

namespace {

// 1 + exp(-x), relative error under 1e-6 wherever 1 / it is a normal number.
//
// exp(-x) = 2^n * 2^f with n the nearest integer to -x * log2(e), found by adding 1.5 * 2^23: the low bits of that sum
// are n. The constant also carries the exponent bias less one; the other factor of two is in the coefficients, so that
// 2^n is infinite only once exp(-x) is.
template <int L>
EFFNET_INLINE F<L> one_plus_exp_minus(F<L> x) {
  constexpr float log2e = 1.44269504f;
  constexpr float magic = 12582912.0f + 126.0f;
  // The bounds keep n within [-126, 129], the exponents of zero and infinity.
  const F<L> z = at_most<L>(at_least<L>(x, -89.4f), 87.3f);
  const F<L> shifted = magic - z * log2e;
  const F<L> n = shifted - magic;
  const F<L> f = -(z * log2e) - n;
  typename Lanes<L>::U bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  F<L> power;
  memcpy(&power, &bits, sizeof power);
  F<L> p = f * 0.0026552488561719656f + 0.019351540133357048f;
  p = p * f + 0.11101431399583817f;
  p = p * f + 0.4804423153400421f;
  p = p * f + 1.386293888092041f;
  p = p * f + 2.000000238418579f;
  return p * power + 1.0f;
}

// A NaN gets lost in the bounds above and comes back with x itself.
template <int L>
EFFNET_INLINE F<L> silu(F<L> x) {
  return x / one_plus_exp_minus<L>(x);
}

template <int L>
EFFNET_INLINE F<L> sigmoid(F<L> x) {
  // x - x is zero but for NaN and the infinities, whose bounds are at hand.
  const F<L> nan = x != x ? x : F<L>{};
  return (1.0f + nan) / one_plus_exp_minus<L>(x);
}

template <int L, int T>
EFFNET_INLINE void activate(F<L> (&values)[T], effnet::Activation act) {
  using effnet::Activation;
  switch (act) {
    case Activation::none:
      break;
    case Activation::silu:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { values[t.value] = silu<L>(values[t.value]); });
      break;
    case Activation::relu:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { values[t.value] = at_least<L>(values[t.value], 0.0f); });
      break;
    case Activation::relu6:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA {
        values[t.value] = at_most<L>(at_least<L>(values[t.value], 0.0f), 6.0f);
      });
      break;
    case Activation::hardswish:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA {
        const F<L> gate = at_most<L>(at_least<L>(values[t.value] + 3.0f, 0.0f), 6.0f);
        values[t.value] = values[t.value] * gate * (1.0f / 6.0f);
      });
      break;
  }
}

}  // namespace
