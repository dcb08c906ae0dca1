#include "gpu/launches.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace effnet {

namespace {

void check(int error, const std::string& what) {
  if (error != 0) throw std::runtime_error(what + " failed with CUDA error " + std::to_string(error));
}

}  // namespace

Launches::Launches(const Driver& driver, int device, std::vector<Launch> launches)
    : driver_(driver), device_(device), launches_(std::move(launches)) {}

// A thread in which nobody has used the device yet, one that only got tensors, has no context.
void Launches::bind_context() const {
  void* context = nullptr;
  check(driver_.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  check(driver_.cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
  check(driver_.cuCtxSetCurrent(context), "cuCtxSetCurrent");
}

void Launches::run(void* stream, const std::vector<std::uint64_t>& addresses) const {
  bind_context();
  std::size_t most = 0;
  for (const Launch& launch : launches_) most = std::max(most, launch.parameters.size());
  // A call has its own, because other threads may run the same launches.
  std::vector<std::uint64_t> values(most);
  std::vector<void*> pointers(most);
  for (std::size_t i = 0; i < most; ++i) pointers[i] = &values[i];
  for (const Launch& launch : launches_) {
    for (std::size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& parameter = launch.parameters[i];
      const std::uint64_t base = parameter.base < 0 ? 0 : addresses.at(static_cast<std::size_t>(parameter.base));
      values[i] = base + parameter.value;
    }
    const int error = driver_.cuLaunchKernel(launch.function, launch.x, launch.y, launch.z, launch.threads, 1, 1,
                                             launch.shared_bytes, stream, pointers.data(), nullptr);
    check(error, launch.name + ": cuLaunchKernel");
  }
}

}  // namespace effnet
