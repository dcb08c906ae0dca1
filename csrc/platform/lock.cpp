#include "platform/lock.h"

#include <mutex>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace effnet {
namespace {

// Never destroyed, because tensors return their memory after every static object is destroyed.
std::mutex& mutex() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}

#if defined(__linux__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { mutex().lock(); }, [] { mutex().unlock(); }, [] { mutex().unlock(); });
#endif

}  // namespace

Lock::Lock() { mutex().lock(); }

Lock::~Lock() { mutex().unlock(); }

}  // namespace effnet
