// Conversions between float and bfloat16 outside of the kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

namespace effnet {

inline float to_float(Bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to nearest even; a NaN stays one.
inline Bf16 to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return static_cast<Bf16>((value != value ? bits | 0x400000u : rounded) >> 16);
}

template <class To, class From>
To convert(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return value;
  } else if constexpr (sizeof(To) == sizeof(float)) {
    return to_float(value);
  } else {
    return to_bf16(value);
  }
}

}  // namespace effnet
