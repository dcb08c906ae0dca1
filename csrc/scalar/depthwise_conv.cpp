#include "../generic/depthwise_conv.inl.h"

void effnet::depthwise_conv_f32_act_sum_1x4_scalar(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<1, 4>(conv, band);
}
