#include "kernels/peak.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "kernels/dispatch.h"
#include "platform/parallel.h"

namespace effnet {

namespace {

template <class T>
double measure(const MapKernels<T>& kernels, int threads) {
  const auto seconds = [&](std::int64_t rounds, int& started) {
    const auto start = std::chrono::steady_clock::now();
    parallel_team(threads, [&](Team& team) {
      if (team.index() == 0) started = team.count();
      volatile float kept = kernels.multiply_add(rounds);
      (void)kept;
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  int started = 1;
  std::int64_t rounds = 1024;
  while (seconds(rounds, started) < 0.01) rounds *= 2;
  double best = seconds(rounds, started);
  for (int repeat = 0; repeat < 8; ++repeat) best = std::min(best, seconds(rounds, started));
  return 2.0 * static_cast<double>(rounds) * kernels.multiply_adds_per_round * started / best;
}

}  // namespace

double fma_peak(const std::string& isa, int threads, bool bf16) {
  const Kernels& kernels = kernels_of(isa);
  if (!bf16) return measure(kernels.f32, threads);
  if (kernels.bf16 == nullptr) throw std::invalid_argument(without_bf16(isa));
  return measure(*kernels.bf16, threads);
}

}  // namespace effnet
