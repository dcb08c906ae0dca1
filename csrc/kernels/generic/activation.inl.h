// Activations, of T vectors at a time, so that T independent chains hide the latency of each; and the functions that
// they consist of.
#pragma once

#include "kernels/generic/lanes.inl.h"
#include "kernels/kernels.h"

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
  const F<L> power = as_floats<L>(as_bits<L>(shifted) << 23);
  return 2.0f * exp2_fraction<L>(f) * power + 1.0f;
}

#if defined(__AVX512F__)
// 2^(i / 16).
alignas(64) constexpr float sixteenths[16] = {
    1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};

// The same from a table, with an instruction that scales by any power of two: it needs no bounds, infinities come out
// right and a NaN stays one. The relative error is under 1.5e-6 for |x| < 20.
//
// exp(-x) = 2^z = 2^n * 2^(i / 16) * 2^f with n the integer below z and f within 1/16. A sum with 1.5 * 2^19 rounded
// downwards has i as its low bits; the lookup and the scaling instruction extract i and n themselves.
EFFNET_INLINE __m512 one_plus_exp_minus_any(__m512 x) {
  const __m512 z = x * -1.44269504f;
  const __m512 shifted = _mm512_add_round_ps(z, _mm512_set1_ps(786432.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 power = _mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(sixteenths));
  const __m512 f = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | 4 << 4);
  const __m512 fraction = (f * 0.24547958f + 0.69302422f) * f + 1.00000048f;
  return _mm512_scalef_ps(power, z) * fraction + 1.0f;
}
#endif

// The division of x keeps a NaN, whatever the bounds above make of it.
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
  // Keeps a NaN, whatever the bounds above make of it. x - x in its place would make NaN of the infinities too.
  const F<L> nan = x != x ? x : F<L>{};
  return (1.0f + nan) / one_plus_exp_minus<L>(x);
}

// silu for maps of type Map. Numbers that become bfloat16 need no division: half a bit of theirs is 2e-3, and the
// reciprocal's relative error is 6e-5.
template <class Map, int L>
EFFNET_INLINE F<L> silu_of_map(F<L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16 && sizeof(Map) < sizeof(float)) {
    return x * (F<L>)_mm512_rcp14_ps(one_plus_exp_minus_any((__m512)x));
  }
#endif
  return silu<L>(x);
}

template <class Map, int L, int T>
EFFNET_INLINE void activate(F<L> (&values)[T], effnet::Activation act) {
  using effnet::Activation;
  switch (act) {
    case Activation::none:
      break;
    case Activation::silu:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { values[t.value] = silu_of_map<Map, L>(values[t.value]); });
      break;
    case Activation::relu:
      unrolled<0, T>([&](auto t) EFFNET_INLINE_LAMBDA { values[t.value] = at_least<L>(values[t.value], 0.0f); });
      break;
    case Activation::relu6:
      unrolled<0, T>(
          [&](auto t) EFFNET_INLINE_LAMBDA { values[t.value] = at_most<L>(at_least<L>(values[t.value], 0.0f), 6.0f); });
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
