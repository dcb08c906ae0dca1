// Memory for floats, aligned to cache lines.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(EFFNET_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

namespace effnet {

constexpr std::size_t cache_line = 64;
constexpr std::size_t huge_page = std::size_t(1) << 21;

// Whether the build has AddressSanitizer. Memory is then allocated with its exact size and freed after use, where it
// would otherwise be rounded up and kept, so that the sanitizer sees every access to memory that is not in use.
#if defined(EFFNET_SANITIZE)
constexpr bool address_sanitizer = true;
#else
constexpr bool address_sanitizer = false;
#endif

struct FreeBuffer {
  std::size_t alignment = cache_line;
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(alignment)); }
};

using Buffer = std::unique_ptr<float[], FreeBuffer>;

// Uninitialised memory. Large buffers are in huge pages where the system has them, because a panel of a map touches a
// cache line in every page.
inline Buffer allocate(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float);
  const std::size_t alignment = bytes < huge_page ? cache_line : huge_page;
  void* memory = ::operator new[](bytes, std::align_val_t(alignment));
#if defined(__linux__)
  if (bytes >= huge_page) madvise(memory, bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
  return Buffer(static_cast<float*>(memory), FreeBuffer{alignment});
}

inline Buffer allocate_zeros(std::int64_t count) {
  Buffer buffer = allocate(count);
  std::memset(buffer.get(), 0, static_cast<std::size_t>(count) * sizeof(float));
  return buffer;
}

// Marks a range between two parts of an allocation: AddressSanitizer reports an access to it, until the whole is freed.
inline void poison([[maybe_unused]] const float* begin, [[maybe_unused]] std::int64_t count) {
#if defined(EFFNET_SANITIZE)
  ASAN_POISON_MEMORY_REGION(begin, static_cast<std::size_t>(count) * sizeof(float));
#endif
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace effnet
