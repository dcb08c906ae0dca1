"""torchvision's EfficientNets and MobileNets, and this package's own networks, which have their structure."""

from functools import partial
from typing import Any

from torch import nn

from effnet_kernels.fusion.inspection import Unsupported, unknown
from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.fusion.spec import Excitation, Layer
from effnet_kernels.interop.adapters import (
    FLATTEN,
    Adapter,
    BlockReader,
    NetworkAdapter,
    NetworkParts,
    blocks_of,
    chain_of,
    children_of,
    name_of,
    plain_child,
    read_activation,
    read_excitation,
    read_layer,
)
from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.modules.stochastic_depth import StochasticDepth


def _read_conv_norm(block: nn.Module, prefix: str = "") -> Layer:
    """Conv2dNormActivation: a sequence of a convolution, a norm and, maybe, an activation."""
    names = list(block.get_submodule(prefix.rstrip("."))._modules)
    if names not in (["0", "1"], ["0", "1", "2"]):
        raise Unsupported(f"{prefix or 'it '}has the children {', '.join(names)}")
    return read_layer(
        block, f"{prefix}0", f"{prefix}1", read_activation(block, f"{prefix}2") if len(names) == 3 else "none"
    )


def _read_sequence(block: nn.Module, sequence: str) -> tuple[list[Layer], Excitation | None]:
    layers: list[Layer] = []
    excitation = None
    if type(plain_child(block, sequence)) is not nn.Sequential:
        raise unknown(sequence, block.get_submodule(sequence))
    children = list(block.get_submodule(sequence)._modules)
    for index, child in enumerate(children):
        path = f"{sequence}.{child}"
        module = plain_child(block, path)
        name = name_of(type(module))
        if name == _LAYER:
            layers.append(_read_conv_norm(block, f"{path}."))
        elif type(module) is nn.Conv2d and index == len(children) - 2:
            layers.append(read_layer(block, path, f"{sequence}.{children[-1]}", "none"))
            break
        elif name == "torchvision.ops.misc.SqueezeExcitation" and index == len(children) - 2:
            if type(plain_child(module, "avgpool")) is not nn.AdaptiveAvgPool2d:
                raise unknown(f"{path}.avgpool", module.get_submodule("avgpool"))
            excitation = read_excitation(block, f"{path}.", "fc1", "activation", "fc2", "scale_activation")
        else:
            raise unknown(path, module)
    return layers, excitation


def _read_block(block: nn.Module, sequence: str) -> ChainSpec:
    """MBConv and FusedMBConv, and the inverted residuals of MobileNetV2 and V3."""
    layers, excitation = _read_sequence(block, sequence)
    drop_path = None
    if "stochastic_depth" in block._modules:
        drop: Any = plain_child(block, "stochastic_depth")
        if name_of(type(drop)) != "torchvision.ops.stochastic_depth.StochasticDepth":
            raise unknown("stochastic_depth", drop)
        # It has our own module's settings, by the same names.
        drop_path = partial(StochasticDepth.drop_path_scale, drop)
    return chain_of(layers, excitation, block.use_res_connect, drop_path)


def _read_network(model: Any, read: BlockReader, calls_pool: bool = True) -> NetworkParts:
    """A sequence ``features`` of stem, stages and head: ours, torchvision's; not all call a module to pool."""
    parts = [list(blocks_of(*child, read)) for child in children_of("features", model.features)]
    maps = list(model.feature_layers) if getattr(model, "features_only", False) else None
    ends, fewest = ([0], maps[-1] + 1) if maps is not None else ([0, -1], 2)
    if len(parts) < fewest or any([len(chain.layers) for _, chain in parts[end]] != [1] for end in ends):
        got = ", ".join(type(layer).__name__ for layer in model.features) or "none"
        raise ValueError(f"features: expected all layers from the stem to the head or the last map, got {got}")
    [stem], *stages = parts
    if maps is not None:
        return NetworkParts(stem, stages, None, None, maps)
    [head] = stages.pop()
    pool = model.avgpool if calls_pool else _MEAN
    return NetworkParts(stem, stages, head, {"avgpool": pool, "flatten": FLATTEN, "classifier": model.classifier}, None)


_MEAN = nn.AdaptiveAvgPool2d(1)
_LAYER = "torchvision.ops.misc.Conv2dNormActivation"
_METHODS = ("forward", "_forward_impl")
SINGLE_LAYERS: dict[str, Adapter] = {_LAYER: lambda block: chain_of([_read_conv_norm(block)])}
BLOCKS: dict[str, Adapter] = {
    "torchvision.models.efficientnet.MBConv": partial(_read_block, sequence="block"),
    "torchvision.models.efficientnet.FusedMBConv": partial(_read_block, sequence="block"),
    "torchvision.models.mobilenetv2.InvertedResidual": partial(_read_block, sequence="conv"),
    "torchvision.models.mobilenetv3.InvertedResidual": partial(_read_block, sequence="block"),
}
NETWORKS: dict[str, NetworkAdapter] = {
    name_of(EfficientNet): NetworkAdapter(_read_network, ("forward", "extract_features", "maps")),
    "torchvision.models.efficientnet.EfficientNet": NetworkAdapter(_read_network, _METHODS),
    "torchvision.models.mobilenetv2.MobileNetV2": NetworkAdapter(partial(_read_network, calls_pool=False), _METHODS),
    "torchvision.models.mobilenetv3.MobileNetV3": NetworkAdapter(_read_network, _METHODS),
}
