"""Fused-MBConv: expand and depthwise as one dense convolution (Tan and Le 2021, section 3.2)."""

from collections.abc import Callable
from functools import partial

from torch import nn

from effnet_kernels.fusion.spec import Activation
from effnet_kernels.modules.block_config import BlockConfig
from effnet_kernels.modules.conv_bn_act import ConvBnAct, PaddingMode
from effnet_kernels.modules.inverted_residual import InvertedResidual


class FusedMBConvConfig(BlockConfig):
    """A stage of Fused-MBConv blocks: a row of Table 4 of the EfficientNetV2 paper; see :class:`BlockConfig`."""

    def __init__(
        self,
        expand_ratio: float,
        kernel: int,
        stride: int,
        input_channels: int,
        out_channels: int,
        num_layers: int,
        block: Callable[..., nn.Module] | None = None,
        *,
        activation: Activation = "silu",
        padding: PaddingMode = "symmetric",
    ) -> None:
        super().__init__(
            expand_ratio,
            kernel,
            stride,
            input_channels,
            out_channels,
            num_layers,
            FusedMBConv if block is None else block,
            activation=activation,
            padding=padding,
            squeeze_ratio=None,
        )


class FusedMBConv(InvertedResidual):
    """A dense k x k convolution that expands, project, and the residual around them.

    Args:
        cnf: the block's configuration.
        stochastic_depth_prob: the probability that a sample skips the residual branch while training.
        norm_layer: builds a norm from its number of channels.

    Shapes: [N, input_channels, H, W] to [N, out_channels, H', W'], in the input's memory format.
    Raises ValueError for a stride other than 1 or 2.
    """

    def __init__(
        self, cnf: FusedMBConvConfig, stochastic_depth_prob: float, norm_layer: Callable[..., nn.Module]
    ) -> None:
        expanded = cnf.expanded_channels
        conv = partial(ConvBnAct, norm_layer=norm_layer, activation=cnf.activation, padding=cnf.padding)
        if expanded != cnf.input_channels:
            layers = [
                conv(cnf.input_channels, expanded, cnf.kernel, cnf.stride),
                conv(expanded, cnf.out_channels, 1, activation="none"),
            ]
        else:
            layers = [conv(cnf.input_channels, cnf.out_channels, cnf.kernel, cnf.stride)]
        super().__init__(cnf, stochastic_depth_prob, layers)
