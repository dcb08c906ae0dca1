#include "../generic/depthwise_conv.inl.h"

void effnet::depthwise_conv_f32_act_sum_1x8_avx512(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<16, 8>(conv, band);
}
