// Vectors of L floats in the compiler's own vector extensions, and one float where it has none.
//
// Included by each instruction set's file. Everything is in an anonymous namespace and nothing comes from std: a shared
// inline function compiled with AVX flags could be the copy that the linker keeps for code that runs everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define EFFNET_INLINE inline __attribute__((always_inline))
#define EFFNET_INLINE_LAMBDA __attribute__((always_inline))
#define EFFNET_NOINLINE __attribute__((noinline))
#else
#define EFFNET_INLINE __forceinline
#define EFFNET_INLINE_LAMBDA
#define EFFNET_NOINLINE __declspec(noinline)
#endif

namespace {

#if defined(__GNUC__)
template <int L>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * L)));
  typedef std::uint32_t U __attribute__((vector_size(4 * L)));
  typedef std::uint16_t H __attribute__((vector_size(2 * L)));
};
#else
template <int L>
struct Lanes;
#endif

template <>
struct Lanes<1> {
  using F = float;
  using U = std::uint32_t;
  using H = std::uint16_t;
};

template <int L>
using F = typename Lanes<L>::F;
template <int L>
using U = typename Lanes<L>::U;

template <int L>
EFFNET_INLINE F<L> as_floats(U<L> bits) {
  F<L> value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <int L>
EFFNET_INLINE U<L> as_bits(F<L> value) {
  U<L> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <int L>
EFFNET_INLINE F<L> load(const float* from) {
  F<L> value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <int L>
EFFNET_INLINE void store(float* to, F<L> value) {
  memcpy(to, &value, sizeof value);
}

// Loads into a register, for an operand of several multiply-adds. The compiler would load it for each of them, and
// a processor loads hardly more vectors of this width in a cycle than it multiplies.
template <int L>
EFFNET_INLINE F<L> load_once(const float* from) {
  F<L> value = load<L>(from);
#if defined(__GNUC__) && defined(__AVX512F__)
  if constexpr (L == 16) asm("" : "+v"(value));
#endif
  return value;
}

// Prefetches a cache line to the second-level cache. The address may be any, also one outside of all memory.
EFFNET_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#else
  (void)address;
#endif
}

// The same, for a line that will be written.
EFFNET_INLINE void prefetch_to_write(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 1, 2);
#else
  (void)address;
#endif
}

// The same number in every lane. The compiler drops the subtraction, because x - 0 is x for every x; it would keep an
// addition, because 0 + -0 is not -0.
template <int L>
EFFNET_INLINE F<L> broadcast(float value) {
  return value - F<L>{};
}

// value < bound ? bound : value, so that a NaN stays. The x86 instruction returns its second operand for a NaN, but the
// compiler does not make it of a comparison and a selection of vectors.
template <int L>
EFFNET_INLINE F<L> at_least(F<L> value, float bound) {
  const F<L> bounds = broadcast<L>(bound);
#if defined(__AVX512F__)
  if constexpr (L == 16) return (F<L>)_mm512_max_ps((__m512)bounds, (__m512)value);
#endif
#if defined(__AVX__)
  if constexpr (L == 8) return (F<L>)_mm256_max_ps((__m256)bounds, (__m256)value);
#endif
  return value < bounds ? bounds : value;
}

template <int L>
EFFNET_INLINE F<L> at_most(F<L> value, float bound) {
  const F<L> bounds = broadcast<L>(bound);
#if defined(__AVX512F__)
  if constexpr (L == 16) return (F<L>)_mm512_min_ps((__m512)bounds, (__m512)value);
#endif
#if defined(__AVX__)
  if constexpr (L == 8) return (F<L>)_mm256_min_ps((__m256)bounds, (__m256)value);
#endif
  return value > bounds ? bounds : value;
}

// The size of the largest register tile: what fits in the registers, or a few where tiles of all sizes would take
// minutes to compile and need not be fast.
constexpr int largest_tile([[maybe_unused]] int fitting, [[maybe_unused]] int few) {
#if defined(EFFNET_FEW_TILES)
  return few;
#else
  return fitting;
#endif
}

template <int... Values>
struct Integers {};

// UpTo<3>::Type is Integers<1, 2, 3>.
template <int N, int... Values>
struct UpTo : UpTo<N - 1, N, Values...> {};
template <int... Values>
struct UpTo<0, Values...> {
  using Type = Integers<Values...>;
};

template <int I>
struct Index {
  static constexpr int value = I;
};

// Calls f(Index<Begin>) ... f(Index<End - 1>). An accumulator array indexed by a loop variable stays in registers only
// if the compiler chooses to unroll that loop; constant indices leave it no choice.
template <int Begin, int End, class Function>
EFFNET_INLINE void unrolled(const Function& f) {
  if constexpr (Begin < End) {
    f(Index<Begin>{});
    unrolled<Begin + 1, End>(f);
  }
}

}  // namespace
