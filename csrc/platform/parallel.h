// Threads. Nothing else in the extension starts any.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace effnet {

// One of a number of threads that go through a sequence of steps together, as it sees the others.
class Team {
 public:
  Team(int index, int count, std::atomic<std::int64_t>* arrivals) : index_(index), count_(count), arrivals_(arrivals) {}

  int index() const { return index_; }
  int count() const { return count_; }

  // Returns once every thread of the team has called it the same number of times; what they wrote before is then
  // visible. It waits in a loop, because the steps between two barriers take microseconds, and after a while yields the
  // core, which another thread may need to arrive.
  void barrier();

 private:
  int index_, count_;
  std::atomic<std::int64_t>* arrivals_;
  std::int64_t passed_ = 0;
};

using TeamFunction = void (*)(void* context, Team& team);

// Calls function once in each of `threads` threads at the same time; in fewer threads, or in the calling one alone, if
// it cannot have so many.
void run_team(int threads, TeamFunction function, void* context);

template <class Function>
void parallel_team(int threads, const Function& f) {
  run_team(
      threads, [](void* context, Team& team) { (*static_cast<const Function*>(context))(team); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The path of the library whose threads are used, or "serial: " and the reason why there are none.
std::string thread_runtime();

}  // namespace effnet
