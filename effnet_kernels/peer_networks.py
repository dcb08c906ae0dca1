"""Whole networks, this package's and others', read as chains: stem, stages, head, and what is behind them.

All of a network is known, or it is refused: whatever its forward calls between the image and the last map is read, and
what it computes of that map stays its own modules.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from effnet_kernels.fusion.inspection import Unsupported, deviation
from effnet_kernels.fusion.spec import Chain
from effnet_kernels.models.efficientnet import EfficientNet, Features
from effnet_kernels.modules.fused_module import FusedModule
from effnet_kernels.peer_blocks import Pair, adapter_of, name_of


class Network(NamedTuple):
    """A network's parts, by their names in the model.

    Attributes:
        stem: the first convolution.
        stages: the blocks, in groups whose last outputs are the model's own feature maps.
        head: the convolution behind the stages, or None.
        tail: what the model computes of the last map, in order, by names; None where it returns maps.
        maps: which outputs the model returns of the stem (0) and the stages (1, 2, ...); None where it classifies.
        image_first: whether the image is the first of the maps that it returns.
    """

    stem: tuple[str, Chain]
    stages: list[list[tuple[str, Chain]]]
    head: tuple[str, Chain] | None
    tail: Mapping[str, nn.Module] | None
    maps: list[int] | None
    image_first: bool = False


class Kind(NamedTuple):
    """A class of networks: what reads them, and the methods that this takes for the class's own."""

    read: Callable[[Any], Network]
    methods: tuple[str, ...]


def read_network(model: nn.Module) -> Network:
    """The parts of an EfficientNet of ours, torchvision, timm or ``efficientnet_pytorch``, or of a relative of it.

    Raises:
        TypeError: for another model; the message names a network inside of it, if there is one.
        ValueError: for a part that is not known, by its name: another class, hooks, methods that were replaced.
    """
    kind = _kind_of(model)
    if kind is None:
        inside = next((name for name, inner in model.named_modules() if name and _is_known(inner)), None)
        hint = ""
        if inside is not None:
            hint = f"; freeze its part model.get_submodule({inside!r}), which is one, with features=True for its maps"
        raise TypeError(
            "expected an EfficientNet of effnet_kernels, torchvision, timm or efficientnet_pytorch, "
            f"got {name_of(getattr(type(model), 'original', type(model)))}{hint}"
        )
    reason = deviation("the model", model)
    replaced = next((method for method in kind.methods if method in model.__dict__), None)
    if reason is None and replaced is not None:
        reason = f"the model had its {replaced} replaced"
    if reason is None and _has_any_global_hook():
        reason = "a global module hook is registered"
    if reason is not None:
        raise ValueError(reason)
    return kind.read(model)


def _kind_of(model: nn.Module) -> Kind | None:
    """What is known of a model's class, or of the one that it is derived from.

    Raises ValueError where the model's class has methods of its own in place of those that are known.
    """
    overridden: dict[str, type] = {}
    for base in type(model).__mro__:
        if base.__module__ == "effnet_kernels.acceleration":
            # What accelerate() mixes in computes what the class itself does.
            continue
        kind = _KINDS.get(name_of(base))
        if kind is None:
            overridden |= dict.fromkeys(base.__dict__, base)
            continue
        own = next((method for method in ("__call__", *kind.methods) if method in overridden), None)
        if own is not None:
            raise ValueError(f"{name_of(overridden[own])} has a {own} of its own, which is not known")
        return kind
    return None


def _is_known(model: nn.Module) -> bool:
    try:
        return _kind_of(model) is not None
    except ValueError:
        return False


def read_block(name: str, module: nn.Module) -> Chain:
    """A block as a chain; raises ValueError with its name for one that is not known."""
    adapter = adapter_of(type(module))
    reason = deviation("it", module)
    if reason is None:
        try:
            if isinstance(module, FusedModule):
                return module.chain_spec().chain
            if adapter is not None:
                return adapter(module).chain
            reason = f"expected a block of an EfficientNet, got {type(module).__name__}"
        except Unsupported as unsupported:
            reason = str(unsupported)
    raise ValueError(f"{name}: {reason}")


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, Chain]]:
    if type(module) is nn.Sequential:
        for inner, child in _children(name, module):
            yield from _blocks(inner, child)
    else:
        yield name, read_block(name, module)


def _children(name: str, sequence: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a sequence calls, by name; one may be there twice. Raises ValueError where it does more."""
    reason = deviation(name, sequence)
    if reason is None and type(sequence) not in (nn.Sequential, Features):
        reason = f"{name} is a {type(sequence).__name__}, not a sequence of modules"
    if reason is not None:
        raise ValueError(reason)
    return [(f"{name}.{inner}", child) for inner, child in sequence._modules.items() if child is not None]


def _read_features(model: Any, calls_pool: bool = True) -> Network:
    """A sequence ``features`` of stem, stages and head: ours, torchvision's; not all call a module to pool."""
    parts = [list(_blocks(*child)) for child in _children("features", model.features)]
    maps = list(model.feature_layers) if getattr(model, "features_only", False) else None
    ends, fewest = ([0], maps[-1] + 1) if maps is not None else ([0, -1], 2)
    if len(parts) < fewest or any([len(chain.layers) for _, chain in parts[end]] != [1] for end in ends):
        got = ", ".join(type(layer).__name__ for layer in model.features) or "none"
        raise ValueError(f"features: expected all layers from the stem to the head or the last map, got {got}")
    [stem], *stages = parts
    if maps is not None:
        return Network(stem, stages, None, None, maps)
    [head] = stages.pop()
    pool = model.avgpool if calls_pool else _MEAN
    return Network(stem, stages, head, {"avgpool": pool, "flatten": _FLATTEN, "classifier": model.classifier}, None)


_MEAN, _FLATTEN = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)


def _read_timm(model: Any) -> Network:
    # MobileNetV3's backbone has an activation of its own behind the stem.
    act = None if hasattr(model, "forward_head") else model._modules.get("act1")
    stem = "conv_stem", read_block("conv_stem", Pair(model.conv_stem, model.bn1, act))
    stages = [list(_blocks(*stage)) for stage in _children("blocks", model.blocks)]
    if not hasattr(model, "forward_head"):
        if model.feature_hooks is not None:
            raise ValueError("feature_location: expected maps from between the blocks, got maps from inside of them")
        return Network(stem, stages, None, None, sorted(model._stage_out_idx))
    if "bn2" not in model._modules:
        # MobileNetV3 pools before its last convolution.
        return Network(stem, stages, None, {"global_pool": TimmHead(model)}, None)
    head = "conv_head", read_block("conv_head", Pair(model.conv_head, model.bn2, None))
    return Network(stem, stages, head, {"global_pool": model.global_pool, "classifier": model.classifier}, None)


class TimmHead(nn.Module):
    """What a network of timm computes of its last map, by its own method: the network without its convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.copy(model)
        left_out = ("conv_stem", "bn1", "blocks")
        self.model._modules = {name: m for name, m in model._modules.items() if name not in left_out}

    def forward(self, x: Tensor) -> Tensor:
        return cast(Any, self.model).forward_head(x)


def _read_lukemelas(model: Any) -> Network:
    stem = "_conv_stem", read_block("_conv_stem", Pair(model._conv_stem, model._bn0, model._swish))
    stages = [[(f"_blocks.{i}", read_block(f"_blocks.{i}", block))] for i, block in enumerate(model._blocks)]
    head = "_conv_head", read_block("_conv_head", Pair(model._conv_head, model._bn1, model._swish))
    tail = {"_avg_pooling": model._avg_pooling}
    if model._global_params.include_top:
        tail |= {"flatten": _FLATTEN, "_dropout": model._dropout, "_fc": model._fc}
    return Network(stem, stages, head, tail, None)


def _read_segmentation_encoder(model: Any) -> Network:
    """The encoder of segmentation_models_pytorch: lukemelas's network, which returns the image and a map a stage."""
    stem = "_conv_stem", read_block("_conv_stem", Pair(model._conv_stem, model._bn0, model._swish))
    stages, begin = [], 0
    for last in model._out_indexes[: model._depth - 1]:
        numbers = range(begin, last + 1)
        stages.append([(f"_blocks.{i}", read_block(f"_blocks.{i}", model._blocks[i])) for i in numbers])
        begin = last + 1
    return Network(stem, stages, None, None, list(range(len(stages) + 1)), image_first=True)


_TORCHVISION, _TIMM = ("forward", "_forward_impl"), ("forward", "forward_features", "forward_head")
_KINDS: dict[str, Kind] = {
    name_of(EfficientNet): Kind(_read_features, ("forward", "extract_features", "maps")),
    "torchvision.models.efficientnet.EfficientNet": Kind(_read_features, _TORCHVISION),
    "torchvision.models.mobilenetv2.MobileNetV2": Kind(partial(_read_features, calls_pool=False), _TORCHVISION),
    "torchvision.models.mobilenetv3.MobileNetV3": Kind(_read_features, _TORCHVISION),
    "timm.models.efficientnet.EfficientNet": Kind(_read_timm, _TIMM),
    "timm.models.efficientnet.EfficientNetFeatures": Kind(_read_timm, ("forward",)),
    "timm.models.mobilenetv3.MobileNetV3": Kind(_read_timm, _TIMM),
    "timm.models.mobilenetv3.MobileNetV3Features": Kind(_read_timm, ("forward",)),
    "efficientnet_pytorch.model.EfficientNet": Kind(_read_lukemelas, ("forward", "extract_features")),
    "segmentation_models_pytorch.encoders.efficientnet.EfficientNetEncoder": Kind(
        _read_segmentation_encoder, ("forward",)
    ),
}
