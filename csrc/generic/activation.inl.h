// Activations of T vectors at a time, so that T independent chains hide the latency of one, and their parts.
#pragma once

#include "../kernels.h"
#include "lanes.inl.h"

namespace {

// 2^f for |f| <= 1/2, relative error under 3e-7.
template <int L>
EFFNET_INLINE F<L> exp2_fraction(F<L> f) {
  F<L> p = f * 0.0013276244280859828f + 0.009675770066678524f;
  p = p * f + 0.055507156997919085f;
  p = p * f + 0.24022115767002106f;
  p = p * f + 0.6931469440460205f;
  return p * f + 1.0000001192092896f;
}

// 1 + exp(-x), relative error under 1e-6 wherever 1 / it is a normal number.
//
// exp(-x) = 2^n * 2^f with n the nearest integer to -x * log2(e), found by adding 1.5 * 2^23: the low bits of that sum
// are n. The constant also carries the exponent bias less one; the other factor of two comes after, so that
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
  return 2.0f * exp2_fraction<L>(f) * power + 1.0f;
}

#if defined(__AVX512F__)
// The same where a power of two may be any: no bounds, infinities come out right by themselves and a NaN stays.
EFFNET_INLINE __m512 one_plus_exp_minus_any(__m512 x) {
  const __m512 z = x * -1.44269504f;
  // z less the nearest integer, 0 for an infinite z.
  const __m512 f = _mm512_reduce_ps(z, _MM_FROUND_TO_NEAREST_INT);
  const __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_scalef_ps((__m512)exp2_fraction<16>((F<16>)f), n) + 1.0f;
}
#endif

// A NaN gets lost in the bounds above and comes back with x itself.
template <int L>
EFFNET_INLINE F<L> silu(F<L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return x / (F<L>)one_plus_exp_minus_any((__m512)x);
#endif
  return x / one_plus_exp_minus<L>(x);
}

template <int L>
EFFNET_INLINE F<L> sigmoid(F<L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return 1.0f / (F<L>)one_plus_exp_minus_any((__m512)x);
#endif
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
