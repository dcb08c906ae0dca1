#pragma once

#include <string>

#include "layer.h"

namespace effnet {

// The operator as its caller sees it. Shapes are the caller's to check; nothing is read or written if the output is
// empty.
struct DepthwiseCall {
  const float* x;       // [N, H, W, C]
  const float* weight;  // [C, kernel, kernel]
  const float* scale;   // [C] or null
  const float* shift;   // [C] or null
  float* y;             // [N, out_height, out_width, C]
  float* pooled;        // [N, C], means of y over its pixels; or null
  std::int64_t batch, height, width, channels;
  std::int64_t out_height, out_width;
  std::int64_t stride;
  Padding padding;
  std::int32_t kernel;
  Activation act;
};

void depthwise_conv(const DepthwiseCall& call, const std::string& isa, int threads);

}  // namespace effnet
