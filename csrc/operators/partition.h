// How operators divide their work into items that any thread may take, each thread with scratch memory of its own.
#pragma once

#include <algorithm>
#include <atomic>

#include "operators/operators.h"
#include "platform/buffer.h"
#include "platform/parallel.h"
#include "platform/pool.h"

namespace effnet {

// Starting a team of threads costs about as much time as one thread takes for this many floats.
constexpr std::int64_t floats_per_thread = 16 * 1024;

inline int threads_for(std::int64_t floats, int threads) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, floats / floats_per_thread)));
}

// Work items that do not depend on each other, for each of which f(item, scratch) is called.
template <class Function>
struct Phase {
  std::int64_t items;
  Function f;
};

template <class Function>
Phase(std::int64_t, Function) -> Phase<Function>;

// Runs one phase after another. Each work item goes to the next free thread; a thread has scratch_floats of scratch.
template <class... Functions>
void parallel_phases(int threads, std::int64_t scratch_floats, const Phase<Functions>&... phases) {
  const std::int64_t pitch = round_up(scratch_floats, panel_columns) + panel_columns;
  const Scratch scratch(threads * pitch);
  for (int i = 0; i < threads; ++i) poison(scratch.get() + i * pitch + scratch_floats, pitch - scratch_floats);
  std::atomic<std::int64_t> taken[sizeof...(phases)] = {};
  parallel_team(threads, [&](Team& team) {
    std::size_t index = 0;
    const auto run = [&](const auto& phase) {
      if (index > 0) team.barrier();
      std::atomic<std::int64_t>& next = taken[index++];
      float* own = scratch.get() + team.index() * pitch;
      for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < phase.items;) phase.f(item, own);
    };
    (run(phases), ...);
  });
}

// Pixels [begin, end) of a group.
struct Shard {
  std::int64_t index, group, begin, end;  // index among the shards of all groups; begin and end from the group's first

  std::int64_t rows() const { return end - begin; }
};

inline Shard shard_of(const Pixels& pixels, std::int64_t index) {
  const std::int64_t group = index / pixels.shards, shard = index % pixels.shards, rows = pixels.group_rows();
  return {index, group, rows * shard / pixels.shards, rows * (shard + 1) / pixels.shards};
}

// A shard in blocks of equal size, as near to `wanted` rows as possible.
struct RowBlocks {
  std::int64_t count, rows;

  RowBlocks(std::int64_t total, std::int64_t wanted) {
    count = std::max<std::int64_t>(1, (total + wanted / 2) / wanted);
    rows = ceil_div(total, count);
    count = ceil_div(total, rows);
  }
};

// The most rows that a block can have: up to one and a half times the wanted number, at which one block becomes two.
inline std::int64_t most_rows(const Pixels& pixels, std::int64_t wanted) {
  return std::min(ceil_div(pixels.group_rows(), pixels.shards), wanted + wanted / 2 + 1);
}

}  // namespace effnet
