"""timm's EfficientNets, MobileNets and MNASNets."""

import copy
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from effnet_kernels.fusion.inspection import Unsupported, unknown
from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.interop.adapters import (
    Adapter,
    BlockReader,
    NetworkAdapter,
    NetworkParts,
    Pair,
    blocks_of,
    chain_of,
    children_of,
    is_identity,
    name_of,
    plain_child,
    read_excitation,
    read_layer,
)
from effnet_kernels.modules.stochastic_depth import draw_factors


def _read_block(block: nn.Module, *layers: tuple[str, str]) -> ChainSpec:
    """Convolutions with norms that bring their activation, one after another, and the modules between them."""
    if getattr(block, "conv_s2d", None) is not None:
        raise Unsupported("it has a space-to-depth convolution")
    if "aa" in block._modules and not is_identity(block, "aa"):
        raise unknown("aa", block.get_submodule("aa"))
    excitation = None
    if "se" in block._modules and not is_identity(block, "se"):
        excite = plain_child(block, "se")
        if name_of(type(excite)) != "timm.models._efficientnet_blocks.SqueezeExcite":
            raise unknown("se", excite)
        excitation = read_excitation(block, "se.", "conv_reduce", "act1", "conv_expand", "gate")
    drop_path = None
    if not is_identity(block, "drop_path"):
        drop = plain_child(block, "drop_path")
        if name_of(type(drop)) != "timm.layers.drop.DropPath":
            raise unknown("drop_path", drop)
        drop_path = partial(_drop_path, drop)
    return chain_of([read_layer(block, *names) for names in layers], excitation, block.has_skip, drop_path)


def _drop_path(drop: Any, x: Tensor) -> Tensor | None:
    if not drop.training or drop.drop_prob == 0.0:
        return None
    return draw_factors(x, drop.drop_prob, scaled=drop.scale_by_keep).flatten()


def _read_network(model: Any, read: BlockReader) -> NetworkParts:
    # MobileNetV3's backbone has an activation of its own behind the stem.
    act = None if hasattr(model, "forward_head") else model._modules.get("act1")
    stem = "conv_stem", read("conv_stem", Pair(model.conv_stem, model.bn1, act))
    stages = [list(blocks_of(*stage, read)) for stage in children_of("blocks", model.blocks)]
    if not hasattr(model, "forward_head"):
        if model.feature_hooks is not None:
            raise ValueError("feature_location: expected maps from between the blocks, got maps from inside of them")
        return NetworkParts(stem, stages, None, None, sorted(model._stage_out_idx))
    if "bn2" not in model._modules:
        # MobileNetV3 pools before its last convolution.
        return NetworkParts(stem, stages, None, {"global_pool": TimmHead(model)}, None)
    head = "conv_head", read("conv_head", Pair(model.conv_head, model.bn2, None))
    return NetworkParts(stem, stages, head, {"global_pool": model.global_pool, "classifier": model.classifier}, None)


class TimmHead(nn.Module):
    """A network of timm behind its last map, by its own method: the network without its convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.copy(model)
        left_out = ("conv_stem", "bn1", "blocks")
        self.model._modules = {name: m for name, m in model._modules.items() if name not in left_out}

    def forward(self, x: Tensor) -> Tensor:
        return cast(Any, self.model).forward_head(x)


_MODULE = "timm.models._efficientnet_blocks"
_METHODS = ("forward", "forward_features", "forward_head")
BLOCKS: dict[str, Adapter] = {
    f"{_MODULE}.InvertedResidual": lambda block: _read_block(
        block, ("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")
    ),
    f"{_MODULE}.DepthwiseSeparableConv": lambda block: _read_block(block, ("conv_dw", "bn1"), ("conv_pw", "bn2")),
    f"{_MODULE}.EdgeResidual": lambda block: _read_block(block, ("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    f"{_MODULE}.ConvBnAct": lambda block: _read_block(block, ("conv", "bn1")),
}
NETWORKS: dict[str, NetworkAdapter] = {
    "timm.models.efficientnet.EfficientNet": NetworkAdapter(_read_network, _METHODS),
    "timm.models.efficientnet.EfficientNetFeatures": NetworkAdapter(_read_network, ("forward",)),
    "timm.models.mobilenetv3.MobileNetV3": NetworkAdapter(_read_network, _METHODS),
    "timm.models.mobilenetv3.MobileNetV3Features": NetworkAdapter(_read_network, ("forward",)),
}
