// The table of kernels, and which of them run on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace effnet {

// The kernels of every instruction set of this build, the preferred one last. Dispatch, tests and benchmarks read this
// table and nothing else.
const std::vector<const Kernels*>& kernel_table();

// The message of the error where an instruction set has no kernels for bfloat16.
std::string without_bf16(const std::string& isa);

// Whether this processor and operating system can run the kernels of an instruction set.
bool isa_supported(const std::string& isa);

// The instruction sets of this build that this machine supports, the preferred one last.
std::vector<std::string> supported_isas();

// The instruction set in use: the one that EFFNET_KERNELS_ISA names, or else the preferred one. Throws
// std::invalid_argument if the variable names none of the supported ones.
const std::string& selected_isa();

// The kernels of an instruction set. Throws std::invalid_argument if the build has none, or this machine cannot run
// them.
const Kernels& kernels_of(const std::string& isa);

}  // namespace effnet
