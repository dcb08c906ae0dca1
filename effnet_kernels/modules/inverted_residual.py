"""What MBConv and Fused-MBConv have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effnet_kernels.fusion.inspection import checked, unknown
from effnet_kernels.fusion.lowering import ChainSpec, lower_chain
from effnet_kernels.fusion.spec import Layer
from effnet_kernels.modules.block_config import BlockConfig
from effnet_kernels.modules.conv_bn_act import ConvBnAct
from effnet_kernels.modules.fused_module import FusedModule
from effnet_kernels.modules.squeeze_excitation import SqueezeExcitation
from effnet_kernels.modules.stochastic_depth import StochasticDepth


class InvertedResidual(FusedModule):
    """Layers that end in a projection, ``block``, with a residual around them where shapes allow.

    Args:
        cnf: the block's configuration.
        stochastic_depth_prob: the probability that a sample skips the residual branch while training.
        layers: the residual branch.

    Raises ValueError for a stride other than 1 or 2.
    """

    def __init__(self, cnf: BlockConfig, stochastic_depth_prob: float, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        if cnf.stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {cnf.stride!r}")
        self.use_res_connect = cnf.stride == 1 and cnf.input_channels == cnf.out_channels
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")
        self.out_channels = cnf.out_channels

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = self.fused(input)
            if fused is not None:
                return fused
            input = self.given_to_hooks(input)
        result = self.block(input)
        if self.use_res_connect:
            # Not in place: an activation at the end of the branch may have saved its output for backward.
            result = self.stochastic_depth(result) + input
        return result

    def chain_spec(self) -> ChainSpec:
        children = self._modules
        branch = checked("block", children.get("block"), (nn.Sequential,))
        drop_path = checked("stochastic_depth", children.get("stochastic_depth"), (StochasticDepth,))
        layers: list[Layer] = []
        for key, child in branch._modules.items():
            name = f"block.{key}"
            if type(child) is ConvBnAct:
                layers.append(checked(name, child, (ConvBnAct,)).layer(f"{name}."))
            elif type(child) is SqueezeExcitation and layers and layers[-1].excitation is None:
                excitation = checked(name, child, (SqueezeExcitation,)).excitation(f"{name}.")
                layers[-1] = layers[-1]._replace(excitation=excitation)
            else:
                raise unknown(name, child)
        return ChainSpec(lower_chain(layers, self.use_res_connect), drop_path.drop_path_scale)
