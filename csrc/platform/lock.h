// The one lock, which protects everything that threads share: the pool of memory, and the plans and arenas of networks.
//
// It is only held for moments, so that a fork can wait for it. Only the forking thread goes on in the child, where a
// lock that another thread held would never be released.
#pragma once

namespace effnet {

class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

}  // namespace effnet
