// The only place that knows about threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace effnet {

// Threads that go through a sequence of steps together.
class Team {
 public:
  Team(int index, int count, std::atomic<std::int64_t>* arrivals) : index_(index), count_(count), arrivals_(arrivals) {}

  int index() const { return index_; }
  int count() const { return count_; }

  // Returns once every thread has called it as often; what they wrote before is then visible. Waits in a loop, because
  // the steps between two barriers take microseconds; yields the core where others need it to arrive.
  void barrier();

 private:
  int index_, count_;
  std::atomic<std::int64_t>* arrivals_;
  std::int64_t passed_ = 0;
};

using TeamFunction = void (*)(void* context, Team& team);

// Calls function once in each of up to so many threads at the same time: in fewer, or in the calling one alone, where no
// more can be had.
void run_team(int threads, TeamFunction function, void* context);

template <class Function>
void parallel_team(int threads, const Function& f) {
  run_team(
      threads, [](void* context, Team& team) { (*static_cast<const Function*>(context))(team); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The library whose threads are used, or "serial: " and the reason.
std::string thread_runtime();

}  // namespace effnet
