// Memory for numbers, at the start of a cache line.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace effnet {

struct FreeBuffer {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

using Buffer = std::unique_ptr<float[], FreeBuffer>;

// Not initialised.
inline Buffer allocate(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float);
  return Buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

inline Buffer allocate_zeros(std::int64_t count) {
  Buffer buffer = allocate(count);
  std::memset(buffer.get(), 0, static_cast<std::size_t>(count) * sizeof(float));
  return buffer;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace effnet
