// Measures the machine's peak.
#pragma once

#include <string>

namespace effnet {

// Floating-point operations per second of `threads` threads that do nothing but multiply-adds in registers, of float32
// or bfloat16 numbers, each counted as two operations. Throws std::invalid_argument where there are none of bfloat16.
double fma_peak(const std::string& isa, int threads, bool bf16);

}  // namespace effnet
