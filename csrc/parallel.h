// The only place that knows about threads.
#pragma once

#include <cstdint>
#include <string>

namespace effnet {

using RangeFunction = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Calls function on parts of [0, n) that cover it once: one part a thread, cut the same way whoever finishes first.
// No part is smaller than grain. Runs in the calling thread alone where threads cannot or need not be had.
void parallel_ranges(std::int64_t n, std::int64_t grain, int threads, RangeFunction function, void* context);

template <class Function>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, const Function& f) {
  parallel_ranges(
      n, grain, threads,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Function*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The library whose threads are used, or "serial: " and the reason.
std::string thread_runtime();

}  // namespace effnet
