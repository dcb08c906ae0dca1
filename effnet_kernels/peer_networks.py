"""Whole networks, this package's and others', read as chains: stem, stages, head, classifier."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from torch import nn

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.modules.chain import ChainModule, Parts
from effnet_kernels.peer_blocks import Pair, UnknownPart, look_up, name_of, reader_of


class Network(NamedTuple):
    """A network's parts, by their names in the model.

    Attributes:
        stem: the first convolution.
        stages: the blocks, in groups whose last outputs are the model's own feature maps.
        head: the convolution whose output is pooled, or None where the model does not classify.
        classifier: of the pooled features, or None where the model does not classify.
        maps: which outputs the model returns of the stem (0) and the stages (1, 2, ...); None where it classifies.
    """

    stem: tuple[str, Parts]
    stages: list[list[tuple[str, Parts]]]
    head: tuple[str, Parts] | None
    classifier: nn.Module | None
    maps: list[int] | None


def read_network(model: nn.Module) -> Network:
    """The parts of an EfficientNet of ours, torchvision, timm or ``efficientnet_pytorch``, or of a relative of it.

    Raises:
        TypeError: for another model.
        ValueError: for a part that is not known, by its name.
    """
    # An accelerated one is of a subclass of its own class.
    kind = getattr(type(model), "original", type(model))
    reader = look_up(kind, _READERS)
    if reader is not None:
        return reader(model)
    raise TypeError(
        f"expected an EfficientNet of effnet_kernels, torchvision, timm or efficientnet_pytorch, got {name_of(kind)}"
    )


def read_block(name: str, module: nn.Module) -> Parts:
    """The parts of a block; raises ValueError with its name for one that is not known."""
    reader = reader_of(type(module))
    if isinstance(module, ChainModule):
        obstacle = module.find_obstacle()
        if obstacle is None:
            return module.parts()
    elif reader is not None:
        try:
            return reader(module)
        except UnknownPart as reason:
            obstacle = str(reason)
    else:
        obstacle = f"expected a block of an EfficientNet, got {type(module).__name__}"
    raise ValueError(f"{name}: {obstacle}")


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, Parts]]:
    if type(module) is nn.Sequential:
        for inner, child in module.named_children():
            yield from _blocks(f"{name}.{inner}", child)
    else:
        yield name, read_block(name, module)


def _read_features(model: Any) -> Network:
    """A sequence ``features`` of stem, stages and head: ours, torchvision's."""
    names = list(model.features._modules)
    parts = [list(_blocks(f"features.{name}", model.features._modules[name])) for name in names]
    maps = list(model.feature_layers) if getattr(model, "features_only", False) else None
    ends, fewest = ([0], maps[-1] + 1) if maps is not None else ([0, -1], 2)
    if len(parts) < fewest or any([len(chain.layers) for _, chain in parts[end]] != [1] for end in ends):
        got = ", ".join(type(layer).__name__ for layer in model.features) or "none"
        raise ValueError(f"features: expected all layers from the stem to the head or the last map, got {got}")
    [stem], *stages = parts
    if maps is not None:
        return Network(stem, stages, None, None, maps)
    [head] = stages.pop()
    return Network(stem, stages, head, _behind_dropout(model.classifier), None)


def _behind_dropout(classifier: nn.Module) -> nn.Module:
    """The layer behind the dropout, where that is all there is."""
    if type(classifier) is nn.Sequential and len(classifier) == 2 and type(classifier[0]) is nn.Dropout:
        return classifier[1]
    return classifier


def _read_timm(model: Any) -> Network:
    stem = "conv_stem", read_block("conv_stem", Pair(model.conv_stem, model.bn1, None))
    stages = [list(_blocks(f"blocks.{name}", stage)) for name, stage in model.blocks.named_children()]
    if "conv_head" not in model._modules:
        if model.feature_hooks is not None:
            raise ValueError("feature_location: expected maps from between the blocks, got maps from inside of them")
        return Network(stem, stages, None, None, sorted(model._stage_out_idx))
    if model.global_pool.pool_type not in ("avg", "fast", "fastavg"):
        raise ValueError(f"global_pool: expected the mean, got {model.global_pool.pool_type!r}")
    head = "conv_head", read_block("conv_head", Pair(model.conv_head, model.bn2, None))
    return Network(stem, stages, head, model.classifier, None)


def _read_lukemelas(model: Any) -> Network:
    stem = "_conv_stem", read_block("_conv_stem", Pair(model._conv_stem, model._bn0, model._swish))
    stages = [[(f"_blocks.{i}", read_block(f"_blocks.{i}", block))] for i, block in enumerate(model._blocks)]
    if not model._global_params.include_top:
        return Network(stem, stages, None, None, None)
    head = "_conv_head", read_block("_conv_head", Pair(model._conv_head, model._bn1, model._swish))
    return Network(stem, stages, head, cast(nn.Module, model._fc), None)


_READERS: dict[str, Callable[[Any], Network]] = {
    name_of(EfficientNet): _read_features,
    "torchvision.models.efficientnet.EfficientNet": _read_features,
    "torchvision.models.mobilenetv2.MobileNetV2": _read_features,
    "torchvision.models.mobilenetv3.MobileNetV3": _read_features,
    "timm.models.efficientnet.EfficientNet": _read_timm,
    "timm.models.efficientnet.EfficientNetFeatures": _read_timm,
    "efficientnet_pytorch.model.EfficientNet": _read_lukemelas,
}
