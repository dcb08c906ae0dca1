// bfloat16: vectors of it in memory, and its dot product.
#pragma once

#include "kernels/generic/lanes.inl.h"

namespace {

using effnet::Bf16;

// Each lane of a vector in the type of another with as many lanes.
template <class To, class From>
EFFNET_INLINE To converted(From values) {
  if constexpr (sizeof(From) <= sizeof(std::uint32_t) && sizeof(To) <= sizeof(std::uint32_t)) {
    return static_cast<To>(values);
  } else {
#if defined(__GNUC__)
    return __builtin_convertvector(values, To);
#endif
  }
}

template <int L>
EFFNET_INLINE F<L> load(const Bf16* from) {
  typename Lanes<L>::H halves;
  memcpy(&halves, from, sizeof halves);
  return as_floats<L>(converted<U<L>>(halves) << 16);
}

// Zeros of the same sign in place of denormal numbers, as the instructions for bfloat16 read and write them.
template <int L>
EFFNET_INLINE U<L> without_denormals(U<L> bits) {
  return (bits & 0x7f800000u) != 0 ? bits : bits & 0x80000000u;
}

// The two instructions where they are missing are functions of their own, because inlined, with sixteen lanes that no
// register holds, they would be most of what is compiled.
template <int L>
EFFNET_NOINLINE typename Lanes<L>::H emulated_rounding(F<L> value) {
  const U<L> bits = without_denormals<L>(as_bits<L>(value));
  const U<L> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return converted<typename Lanes<L>::H>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

template <int L>
EFFNET_NOINLINE F<L> emulated_dot(F<L> sums, U<L> a, U<L> b) {
  const auto add = [&](U<L> x, U<L> y) EFFNET_INLINE_LAMBDA {
    const F<L> factor = as_floats<L>(without_denormals<L>(x)), other = as_floats<L>(without_denormals<L>(y));
    sums = as_floats<L>(without_denormals<L>(as_bits<L>(sums)));
    sums = as_floats<L>(without_denormals<L>(as_bits<L>(sums + factor * other)));
  };
  add(a & 0xffff0000u, b & 0xffff0000u);
  add(a << 16, b << 16);
  return sums;
}

// Rounded to nearest even. A NaN keeps its sign and the upper bits of its payload, and becomes quiet.
template <int L>
EFFNET_INLINE typename Lanes<L>::H rounded_to_bf16(F<L> value) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return (typename Lanes<L>::H)_mm512_cvtneps_pbh((__m512)value);
  if constexpr (L == 8) return (typename Lanes<L>::H)_mm256_cvtneps_pbh((__m256)value);
#endif
  return emulated_rounding<L>(value);
}

template <int L>
EFFNET_INLINE void store(Bf16* to, F<L> value) {
  const auto halves = rounded_to_bf16<L>(value);
  memcpy(to, &halves, sizeof halves);
}

// L pairs of numbers.
template <int L>
EFFNET_INLINE U<L> load_pairs(const Bf16* from) {
  U<L> pairs;
  memcpy(&pairs, from, sizeof pairs);
  return pairs;
}

// sums + the products of the numbers in the upper halves, then + those of the lower halves. Products are not rounded;
// denormal numbers count as zero before and after each addition. So does the instruction, whose bits these are, except
// for the sign of a zero where a product is smaller than every float.
template <int L>
EFFNET_INLINE F<L> dot(F<L> sums, U<L> a, U<L> b) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return (F<L>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  if constexpr (L == 8) return (F<L>)_mm256_dpbf16_ps((__m256)sums, (__m256bh)a, (__m256bh)b);
#endif
  return emulated_dot<L>(sums, a, b);
}

}  // namespace
