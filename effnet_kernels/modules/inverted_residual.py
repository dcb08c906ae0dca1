"""What MBConv and Fused-MBConv have in common."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from effnet_kernels.modules.block_config import BlockConfig
from effnet_kernels.modules.chain import ChainModule, Parts
from effnet_kernels.modules.conv_bn_act import ConvBnAct
from effnet_kernels.modules.operator_module import children_obstacle
from effnet_kernels.modules.squeeze_excitation import SqueezeExcitation
from effnet_kernels.modules.stochastic_depth import StochasticDepth


class InvertedResidual(ChainModule):
    """A sequence of layers that ends in a projection, with a residual around it where shapes allow.

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

    def forward_modules(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            # Not in place: an activation at the end of the branch may have saved its output for backward.
            result = self.stochastic_depth(result) + input
        return result

    def parts_of(self, layers: Sequence[ConvBnAct], excitation: SqueezeExcitation | None = None) -> Parts:
        """The layers, with stochastic depth and the residual around them."""
        return Parts(
            tuple(layer.part() for layer in layers),
            None if excitation is None else excitation.layers(),
            self.use_res_connect,
            self.stochastic_depth.keep,
        )

    def layers_obstacle(self, expected: Sequence[type[ConvBnAct] | type[SqueezeExcitation]]) -> str | None:
        """Why the operators cannot stand for the layers, which should be of these classes, or None."""
        own, layers = self._modules, self.block._modules
        if len(layers) != len(expected):
            return f"block has {len(layers)} children, not {len(expected)}"
        obstacle = children_obstacle((name, own[name], kinds) for name, kinds in _CHILDREN.items())
        if obstacle is None:
            obstacle = children_obstacle(
                (f"block.{name}", layer, (kind,)) for (name, layer), kind in zip(layers.items(), expected, strict=True)
            )
        if obstacle is not None:
            return obstacle
        for name, layer in layers.items():
            inner = cast(Any, layer).find_obstacle()
            if inner is not None:
                return f"block.{name}: {inner}"
        return None


_CHILDREN: dict[str, tuple[type[nn.Module], ...]] = {"block": (nn.Sequential,), "stochastic_depth": (StochasticDepth,)}
