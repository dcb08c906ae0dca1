#include "../generic/depthwise_conv.inl.h"

void effnet::depthwise_conv_f32_act_sum_1x8_neon(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<4, 8>(conv, band);
}
