#include "../generic/depthwise_conv.inl.h"

void effnet::depthwise_conv_f32_act_sum_1x8_avx2(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<8, 8>(conv, band);
}
