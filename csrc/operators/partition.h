// How operators share their work: units that any thread may take, and scratch that each thread keeps.
#pragma once

#include <algorithm>
#include <atomic>

#include "operators/operators.h"
#include "platform/buffer.h"
#include "platform/parallel.h"
#include "platform/pool.h"

namespace effnet {

// Starting a team costs about as much as this many floats through one thread.
constexpr std::int64_t floats_per_thread = 16 * 1024;

inline int threads_for(std::int64_t floats, int threads) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, floats / floats_per_thread)));
}

// Units of work that do not depend on each other: f(unit, scratch) for each.
template <class Function>
struct Phase {
  std::int64_t units;
  Function f;
};

template <class Function>
Phase(std::int64_t, Function) -> Phase<Function>;

// One phase after another, each unit in whichever thread is free, with scratch of so many floats a thread.
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
      for (std::int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < phase.units;) phase.f(unit, own);
    };
    (run(phases), ...);
  });
}

// Rows [begin, end) of a group.
struct Part {
  std::int64_t index, group, begin, end;  // rows from the group's first

  std::int64_t rows() const { return end - begin; }
};

inline Part part_of(const Pixels& pixels, std::int64_t index) {
  const std::int64_t group = index / pixels.parts, part = index % pixels.parts, rows = pixels.group_rows();
  return {index, group, rows * part / pixels.parts, rows * (part + 1) / pixels.parts};
}

// Blocks of a part: as near to `wanted` rows as equal blocks come.
struct Blocks {
  std::int64_t count, rows;

  Blocks(std::int64_t total, std::int64_t wanted) {
    count = std::max<std::int64_t>(1, (total + wanted / 2) / wanted);
    rows = ceil_div(total, count);
    count = ceil_div(total, rows);
  }
};

// No block has more rows than this: it is one and a half times what is wanted where that decides between one and two.
inline std::int64_t most_rows(const Pixels& pixels, std::int64_t wanted) {
  return std::min(ceil_div(pixels.group_rows(), pixels.parts), wanted + wanted / 2 + 1);
}

}  // namespace effnet
