// Memory of large tensors, kept for the next one of its size.
//
// A training step makes the same maps again and again. The system's allocator returns memory of this size at once and
// clears every page of the next request, which costs a third of a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "platform/buffer.h"

namespace effnet {

// Goes back to the pool when the last copy of it goes.
using Block = std::shared_ptr<void>;

// At least so many bytes, at the start of a cache line, not initialised; in huge pages where the system has them.
Block acquire(std::size_t bytes);

// Memory for the length of a call. Sizes are rounded up to powers of two, so that calls of other shapes find it again.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::int64_t floats) {
    const std::size_t needed = static_cast<std::size_t>(floats) * sizeof(float);
    std::size_t bytes = watched ? needed : 4096;
    while (bytes < needed) bytes *= 2;
    block_ = acquire(bytes);
  }
  float* get() const { return static_cast<float*>(block_.get()); }

 private:
  Block block_;
};

// Frees what is in the pool and not in use.
void release_memory();

}  // namespace effnet
