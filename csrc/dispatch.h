// Which kernel runs on this machine.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "kernels.h"

namespace effnet {

// One alternative for each operator's signature: looking a kernel up by its type cannot return another operator's.
using AnyKernel = std::variant<DepthwiseConvKernel>;

struct KernelRow {
  const char* op;
  const char* isa;
  int lanes;
  bool emulated;  // never chosen: there so that tests reach its logic on machines without its instruction set
  AnyKernel run;
};

// Every kernel of this build, the preferred ones last. Dispatch and tests read this table and nothing else.
const std::vector<KernelRow>& kernel_table();

// Whether this processor and operating system can run it.
bool isa_supported(const std::string& isa);

// The instruction sets of this build that this machine supports, the preferred one last.
std::vector<std::string> supported_isas();

// The one in use: EFFNET_KERNELS_ISA, or the preferred one. Throws std::invalid_argument if the variable names another.
const std::string& selected_isa();

// The kernel for this instruction set, or for the widest one before it in the table whose vectors fit in the channels.
template <class Kernel>
struct Found {
  Kernel run = nullptr;
  int lanes = 0;
};

template <class Kernel>
Found<Kernel> find_kernel(const std::string& isa, std::int64_t channels) {
  Found<Kernel> found;
  for (const KernelRow& row : kernel_table()) {
    const Kernel* run = std::get_if<Kernel>(&row.run);
    if (run == nullptr || !isa_supported(row.isa) || (row.emulated && row.isa != isa)) continue;
    if (row.lanes <= channels) found = {*run, row.lanes};
    if (row.isa == isa) return found;
  }
  return {};
}

}  // namespace effnet
