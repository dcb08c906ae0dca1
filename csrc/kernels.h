// What every kernel takes: plain structs over raw pointers, so that a kernel knows neither Python nor torch.
#pragma once

#include <cstdint>

namespace effnet {

enum class Activation : std::int32_t { none, silu, relu, relu6, hardswish };

// y = act(depthwise(x) + shift), fp32, channels last, with the scale already inside the packed weights.
//
// Channels are cut in slots of `lanes`. The last slot ends with the last channel, so it overlaps the slot before it
// when lanes does not divide the channels: no kernel needs a mask, none reads past a pixel, and channels >= lanes
// always.
struct DepthwiseConv {
  const float* x;       // [N, H, W, C]
  const float* packed;  // [slots, 1 + kernel * kernel, lanes]: the shift, then the taps in row order
  float* y;             // [N, out_height, out_width, C]
  float* row_sums;      // [N, out_height, slots, lanes], sums of y over a row; may be null
  std::int64_t height, width, channels;
  std::int64_t out_height, out_width;
  std::int64_t slots;
  std::int64_t stride, pad_left, pad_top;
  std::int32_t kernel;  // 3, 5 or 7
  Activation act;
};

// The part of the output that one call computes.
struct DepthwiseBand {
  std::int64_t image;
  std::int64_t row_begin, row_end;
  std::int64_t slot_begin, slot_end;
};

using DepthwiseConvKernel = void (*)(const DepthwiseConv&, const DepthwiseBand&);

// First channel of a slot. Static, because files compiled for different instruction sets include it.
static inline std::int64_t slot_channel(std::int64_t slot, std::int64_t lanes, std::int64_t channels) {
  const std::int64_t first = slot * lanes;
  return first + lanes <= channels ? first : channels - lanes;
}

void depthwise_conv_f32_act_sum_1x4_scalar(const DepthwiseConv&, const DepthwiseBand&);
void depthwise_conv_f32_act_sum_1x8_neon(const DepthwiseConv&, const DepthwiseBand&);
void depthwise_conv_f32_act_sum_1x8_avx2(const DepthwiseConv&, const DepthwiseBand&);
void depthwise_conv_f32_act_sum_1x8_avx512(const DepthwiseConv&, const DepthwiseBand&);
void depthwise_conv_f32_act_sum_1x4_emulated4(const DepthwiseConv&, const DepthwiseBand&);
void depthwise_conv_f32_act_sum_1x4_emulated16(const DepthwiseConv&, const DepthwiseBand&);

}  // namespace effnet
