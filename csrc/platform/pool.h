// Keeps the memory of large tensors for the next tensors of the same size.
//
// Training steps allocate the same maps again and again. The C library returns memory of this size to the system at
// once, and the system clears every page of the next request, which costs a third of a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "platform/buffer.h"

namespace effnet {

// Memory that returns to the pool with the last copy of the pointer.
using Block = std::shared_ptr<void>;

// At least so many bytes of uninitialised memory, aligned to a cache line; in huge pages where the system has them.
Block acquire(std::size_t bytes);

// Memory for the duration of a call. Sizes are rounded up to powers of two, so that calls of other shapes can reuse it.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::int64_t floats) {
    const std::size_t needed = static_cast<std::size_t>(floats) * sizeof(float);
    std::size_t bytes = address_sanitizer ? needed : 4096;
    while (bytes < needed) bytes *= 2;
    block_ = acquire(bytes);
  }
  float* get() const { return static_cast<float*>(block_.get()); }

 private:
  Block block_;
};

// Frees the memory in the pool that is not in use.
void release_memory();

}  // namespace effnet
