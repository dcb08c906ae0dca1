// Threads come from the OpenMP runtime that torch has loaded. Linking one at build time could bring a second one, and
// two thread pools in one process fight over the cores.
#include "platform/parallel.h"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstring>
#endif

namespace effnet {
namespace {

#if defined(__linux__)

struct OpenMP {
  // The function that gcc calls for `#pragma omp parallel`; LLVM's and Intel's runtimes export it too.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path;
};

template <class Function>
bool resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

bool resolve_all(void* handle, OpenMP& openmp) {
  if (!resolve(handle, "GOMP_parallel", openmp.parallel) || !resolve(handle, "omp_get_thread_num", openmp.thread_num) ||
      !resolve(handle, "omp_get_num_threads", openmp.num_threads) ||
      !resolve(handle, "omp_in_parallel", openmp.in_parallel)) {
    return false;
  }
  Dl_info info;
  const bool named = dladdr(reinterpret_cast<void*>(openmp.parallel), &info) != 0 && info.dli_fname != nullptr;
  openmp.path = named ? info.dli_fname : "unknown";
  return true;
}

struct Search {
  const char* const* names;
  OpenMP* openmp;
  bool found;
};

int visit_library(dl_phdr_info* info, std::size_t, void* data) {
  Search& search = *static_cast<Search*>(data);
  if (info->dlpi_name == nullptr) return 0;
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash == nullptr ? info->dlpi_name : slash + 1;
  for (const char* const* name = search.names; *name != nullptr; ++name) {
    if (std::strncmp(file, *name, std::strlen(*name)) != 0) continue;
    // RTLD_NOLOAD finds a library only if it is already loaded. The handle is never closed, so that the library stays.
    void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_NOW);
    if (handle != nullptr && resolve_all(handle, *search.openmp)) {
      search.found = true;
      return 1;
    }
  }
  return 0;
}

bool find_openmp(OpenMP& openmp) {
  // Searches in the order in which the loader bound torch itself: first the global scope, where LD_PRELOAD puts
  // libraries, then torch's own dependencies, which a lookup through torch's handle searches.
  if (resolve_all(RTLD_DEFAULT, openmp)) return true;
  static const char* const torch_names[] = {"libtorch_cpu.so", nullptr};
  static const char* const runtime_names[] = {"libgomp", "libomp", "libiomp5", nullptr};
  for (const char* const* names : {torch_names, runtime_names}) {
    Search search{names, &openmp, false};
    dl_iterate_phdr(visit_library, &search);
    if (search.found) return true;
  }
  return false;
}

// GNU OpenMP's threads do not survive a fork, and its next parallel region waits for them for ever.
std::atomic<bool> forked_child{false};

const OpenMP* openmp_runtime() {
  static const OpenMP* const runtime = []() -> const OpenMP* {
    static OpenMP openmp;
    return find_openmp(openmp) ? &openmp : nullptr;
  }();
  return runtime;
}

// Registered when the library is loaded, so that a fork before the first call is noticed too: torch may have started
// threads by then.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

struct TeamRegion {
  const OpenMP* openmp;
  TeamFunction function;
  void* context;
  std::atomic<std::int64_t> arrivals{0};
};

void run_member(void* data) {
  TeamRegion& region = *static_cast<TeamRegion*>(data);
  Team team(region.openmp->thread_num(), region.openmp->num_threads(), &region.arrivals);
  region.function(region.context, team);
}

// The runtime to start threads with, or null if the calling thread has to do the work alone: because there is no
// runtime, in a forked child, or in a nested region, whose threads would compete with those that already occupy the
// cores.
const OpenMP* usable_openmp() {
  if (forked_child) return nullptr;
  const OpenMP* openmp = openmp_runtime();
  return openmp != nullptr && !openmp->in_parallel() ? openmp : nullptr;
}

#endif

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

void Team::barrier() {
  if (count_ == 1) return;
  const std::int64_t all = ++passed_ * count_;
  arrivals_->fetch_add(1, std::memory_order_acq_rel);
  for (int spins = 0; arrivals_->load(std::memory_order_acquire) < all; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void run_team(int threads, TeamFunction function, void* context) {
#if defined(__linux__)
  if (threads > 1) {
    if (const OpenMP* openmp = usable_openmp()) {
      TeamRegion region;
      region.openmp = openmp;
      region.function = function;
      region.context = context;
      openmp->parallel(run_member, &region, static_cast<unsigned>(threads), 0);
      return;
    }
  }
#else
  (void)threads;
#endif
  Team alone(0, 1, nullptr);
  function(context, alone);
}

std::string thread_runtime() {
#if defined(__linux__)
  if (forked_child) return "serial: this process is a forked child, where the parent's OpenMP threads are gone";
  const OpenMP* openmp = openmp_runtime();
  return openmp != nullptr ? openmp->path : "serial: no OpenMP runtime is loaded in this process";
#else
  return "serial: threads are shared with torch on Linux only";
#endif
}

}  // namespace effnet
