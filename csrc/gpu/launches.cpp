#include "gpu/launches.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace effnet {

Launches::Launches(LaunchKernel launch_kernel, std::vector<Launch> launches)
    : launch_kernel_(launch_kernel), launches_(std::move(launches)) {}

void Launches::run(void* stream, const std::vector<std::uint64_t>& addresses) const {
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
    const int error = launch_kernel_(launch.function, launch.x, launch.y, launch.z, launch.threads, 1, 1,
                                     launch.shared_bytes, stream, pointers.data(), nullptr);
    if (error != 0) {
      throw std::runtime_error(launch.name + ": the driver's cuLaunchKernel failed with CUDA error " +
                               std::to_string(error));
    }
  }
}

}  // namespace effnet
