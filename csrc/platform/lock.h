// The lock of all that threads share: the pool of memory, and the plans and arenas of networks.
//
// There is one, which is held for moments, so that a fork can wait for it: in the child only the forking thread goes on,
// and a lock that another thread held would never be released.
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
