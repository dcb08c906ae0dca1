"""What one stage of a network is made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from effnet_kernels.fusion.spec import Activation
from effnet_kernels.modules.conv_bn_act import PaddingMode


def make_divisible(value: float, divisor: int = 8, min_value: int | None = None, round_limit: float = 0.9) -> int:
    """The multiple of ``divisor`` nearest to ``value``, one step up where that loses more than 1 - round_limit of it.

    Source: the channel rounding of MobileNet's and EfficientNet's released code.
    """
    rounded = max(min_value or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * value else rounded


@dataclass
class BlockConfig:
    """A stage: ``num_layers`` blocks, of which the first has this stride and ``input_channels``.

    Attributes:
        expand_ratio: expanded channels per input channel.
        kernel: size of the depthwise (fused: dense) kernel.
        stride: 1 or 2, of the first block; the others have 1.
        input_channels, out_channels: of the first block.
        num_layers: blocks in the stage.
        block: builds one block from (config, stochastic_depth_prob, norm_layer).
        activation: of the expand and depthwise convolutions and the squeeze.
        padding: ``"symmetric"`` or ``"same"``.
        squeeze_ratio: squeeze channels per input channel; None leaves squeeze-and-excitation out.
    """

    expand_ratio: float
    kernel: int
    stride: int
    input_channels: int
    out_channels: int
    num_layers: int
    block: Callable[..., nn.Module]
    activation: Activation = field(default="silu", kw_only=True)
    padding: PaddingMode = field(default="symmetric", kw_only=True)
    squeeze_ratio: float | None = field(default=0.25, kw_only=True)

    @staticmethod
    def adjust_channels(channels: float, width_mult: float, min_value: int | None = None) -> int:
        """``channels * width_mult``, rounded to a multiple of 8."""
        return make_divisible(channels * width_mult, 8, min_value)

    @staticmethod
    def adjust_depth(num_layers: int, depth_mult: float) -> int:
        """``num_layers * depth_mult``, rounded up."""
        return math.ceil(num_layers * depth_mult)

    @property
    def expanded_channels(self) -> int:
        return self.adjust_channels(self.input_channels, self.expand_ratio)
