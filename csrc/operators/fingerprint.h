// A hash of parameters, which tells whether they still have the values that were packed.
#pragma once

#include <cstdint>
#include <vector>

#include "operators/operators.h"

namespace effnet {

struct Bytes {
  const void* data;
  std::int64_t count;
};

// 64 bits of the bytes in order, whatever the threads and the instruction set. One number of eight bytes that changes
// changes the hash for certain, and other changes do but for one in 2^64.
std::uint64_t fingerprint(const std::vector<Bytes>& memory, const Execution& execution);

}  // namespace effnet
