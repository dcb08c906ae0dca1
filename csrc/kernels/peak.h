// Measures the machine's peak.
#pragma once

#include <string>

namespace effnet {

// Floating-point operations per second of `threads` threads that do nothing but multiply-adds in registers, each
// counted as two operations.
double fma_peak(const std::string& isa, int threads);

}  // namespace effnet
