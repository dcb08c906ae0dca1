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

// A 64-bit hash of the bytes in order. It does not depend on the number of threads or the instruction set. A change of
// one float always changes it; changes of several stay unseen with a chance of one in 2^64.
std::uint64_t fingerprint(const std::vector<Bytes>& memory, const Execution& execution);

}  // namespace effnet
