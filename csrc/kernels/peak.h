// Measures what the machine can do at best.
#pragma once

#include <string>

namespace effnet {

// Floating-point operations a second of so many threads that only multiply and add, two operations each, in registers.
double fma_peak(const std::string& isa, int threads);

}  // namespace effnet
