// The 4- and 16-lane loops lowered to whatever the baseline has, so that their logic is tested on every machine.
#include "../generic/depthwise_conv.inl.h"

void effnet::depthwise_conv_f32_act_sum_1x4_emulated4(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<4, 4>(conv, band);
}

void effnet::depthwise_conv_f32_act_sum_1x4_emulated16(const DepthwiseConv& conv, const DepthwiseBand& band) {
  ::depthwise_conv<16, 4>(conv, band);
}
