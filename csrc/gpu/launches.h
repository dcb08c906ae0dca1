// Kernel launches on a GPU, made one after the other by the driver's own function.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace effnet {

// Functions of CUDA's driver, by its names. Each returns 0, or an error's number.
struct Driver {
  // A function, three sizes of the grid and of a block, bytes of shared memory, a stream, the address of each
  // parameter, and null.
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);
  int (*cuCtxGetCurrent)(void** context);
  int (*cuCtxSetCurrent)(void* context);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
};

// A parameter of eight bytes or fewer: `value`, or that many bytes behind address number `base`.
struct Parameter {
  int base;  // none: -1
  std::uint64_t value;
};

struct Launch {
  std::string name;
  void* function;
  unsigned x, y, z;
  unsigned threads;  // of a block
  unsigned shared_bytes;
  std::vector<Parameter> parameters;
};

class Launches {
 public:
  Launches(const Driver& driver, int device, std::vector<Launch> launches);

  // Makes all launches on a stream of the device. Throws std::runtime_error with the driver's error where one fails,
  // and makes none after it.
  void run(void* stream, const std::vector<std::uint64_t>& addresses) const;

 private:
  void bind_context() const;

  Driver driver_;
  int device_;
  std::vector<Launch> launches_;
};

}  // namespace effnet
