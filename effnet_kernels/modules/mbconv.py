"""MBConv: the inverted residual block with squeeze-and-excitation (Tan and Le 2019, section 4)."""

from collections.abc import Callable
from functools import partial

from torch import nn

from effnet_kernels.fusion.spec import Activation
from effnet_kernels.modules.block_config import BlockConfig
from effnet_kernels.modules.conv_bn_act import ConvBnAct, PaddingMode, make_activation
from effnet_kernels.modules.inverted_residual import InvertedResidual
from effnet_kernels.modules.squeeze_excitation import SqueezeExcitation


class MBConvConfig(BlockConfig):
    """A stage of MBConv blocks: a row of Table 1 of the EfficientNet paper or Table 4 of the EfficientNetV2 paper.

    Channels are scaled by ``width_mult`` and the number of blocks by ``depth_mult``; see :class:`BlockConfig`.
    """

    def __init__(
        self,
        expand_ratio: float,
        kernel: int,
        stride: int,
        input_channels: int,
        out_channels: int,
        num_layers: int,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        block: Callable[..., nn.Module] | None = None,
        *,
        activation: Activation = "silu",
        padding: PaddingMode = "symmetric",
        squeeze_ratio: float | None = 0.25,
    ) -> None:
        super().__init__(
            expand_ratio,
            kernel,
            stride,
            self.adjust_channels(input_channels, width_mult),
            self.adjust_channels(out_channels, width_mult),
            self.adjust_depth(num_layers, depth_mult),
            MBConv if block is None else block,
            activation=activation,
            padding=padding,
            squeeze_ratio=squeeze_ratio,
        )


class MBConv(InvertedResidual):
    """Expand, depthwise, squeeze and excite, project, and the residual around them.

    Args:
        cnf: the block's configuration.
        stochastic_depth_prob: the probability that a sample skips the residual branch while training.
        norm_layer: builds a norm from its number of channels.
        se_layer: builds squeeze-and-excitation from (channels, squeeze channels, activation=...).

    Shapes: [N, input_channels, H, W] to [N, out_channels, H', W'], in the input's memory format.
    Raises ValueError for a stride other than 1 or 2.
    """

    def __init__(
        self,
        cnf: MBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
        se_layer: Callable[..., nn.Module] = SqueezeExcitation,
    ) -> None:
        expanded = cnf.expanded_channels
        conv = partial(ConvBnAct, norm_layer=norm_layer, activation=cnf.activation, padding=cnf.padding)
        layers: list[nn.Module] = []
        if expanded != cnf.input_channels:
            layers.append(conv(cnf.input_channels, expanded, 1))
        layers.append(conv(expanded, expanded, cnf.kernel, cnf.stride, groups=expanded))
        if cnf.squeeze_ratio is not None:
            squeezed = max(1, int(cnf.input_channels * cnf.squeeze_ratio))
            layers.append(se_layer(expanded, squeezed, activation=partial(make_activation, cnf.activation)))
        layers.append(conv(expanded, cnf.out_channels, 1, activation="none"))
        super().__init__(cnf, stochastic_depth_prob, layers)
