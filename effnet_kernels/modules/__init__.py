"""The parts that EfficientNets are built of."""

from effnet_kernels.modules.block_config import BlockConfig
from effnet_kernels.modules.conv_bn_act import ConvBnAct
from effnet_kernels.modules.fused_mbconv import FusedMBConv, FusedMBConvConfig
from effnet_kernels.modules.mbconv import MBConv, MBConvConfig
from effnet_kernels.modules.squeeze_excitation import SqueezeExcitation
from effnet_kernels.modules.stochastic_depth import StochasticDepth

__all__ = [
    "BlockConfig",
    "ConvBnAct",
    "FusedMBConv",
    "FusedMBConvConfig",
    "MBConv",
    "MBConvConfig",
    "SqueezeExcitation",
    "StochasticDepth",
]
