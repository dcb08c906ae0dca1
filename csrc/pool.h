// Memory of large tensors, kept for the next one of its size.
//
// A training step makes the same maps again and again. The system's allocator returns memory of this size at once and
// clears every page of the next request, which costs a third of a step.
#pragma once

#include <cstddef>
#include <memory>

namespace effnet {

// Goes back to the pool when the last copy of it goes.
using Block = std::shared_ptr<void>;

// At least so many bytes, at the start of a cache line, not initialised; in huge pages where the system has them.
Block acquire(std::size_t bytes);

// Frees what is in the pool and not in use.
void release_memory();

}  // namespace effnet
