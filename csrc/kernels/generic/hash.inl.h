// A hash of bytes, for comparison with an earlier hash of the same memory.
#pragma once

#include <cstring>

#include "kernels/generic/lanes.inl.h"

namespace {

// Independent chains, as many as two vectors of the widest instruction set hold: a multiplication's latency is long.
constexpr int hash_chains = 16;

// The steps are bijections of a chain's state, so that a change of one number is never lost, and rotated, so that a
// number's high bits reach all others. The compiler makes vectors of the loops over chains.
inline std::uint64_t hash(const void* data, std::int64_t bytes) {
  constexpr std::uint64_t factor = 0x9fb21c651e98df25u;
  constexpr std::int64_t stripe = hash_chains * sizeof(std::uint64_t);
  std::uint64_t chains[hash_chains], values[hash_chains];
  for (int i = 0; i < hash_chains; ++i) chains[i] = static_cast<std::uint64_t>(i + 1) * 0xd6e8feb86659fd93u;
  const char* from = static_cast<const char*>(data);
  for (std::int64_t begin = 0; begin < bytes; begin += stripe, from += stripe) {
#if defined(__GNUC__)
    // Past the caches, which keep what the calls between two hashes read: the packed weights.
    for (int line = 0; line < 2; ++line) __builtin_prefetch(from + 1024 + 64 * line, 0, 0);
#endif
    const std::int64_t left = bytes - begin;
    if (left < stripe) memset(values, 0, sizeof values);
    memcpy(values, from, static_cast<std::size_t>(left < stripe ? left : stripe));
    for (int i = 0; i < hash_chains; ++i) {
      const std::uint64_t mixed = chains[i] ^ values[i];
      chains[i] = (mixed << 29 | mixed >> 35) * factor;
    }
  }
  std::uint64_t hash = static_cast<std::uint64_t>(bytes);
  for (int i = 0; i < hash_chains; ++i) {
    hash = (hash ^ chains[i]) * factor;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace
