"""The readers of a block's parts, which all adapters share, and the leaf classes of other packages.

Classes are known by name, so that nothing has to be installed that a model does not bring along.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from effnet_kernels.fusion.accelerated_class import original_of
from effnet_kernels.fusion.inspection import ACTIVATIONS_OF, GATES_OF, Unsupported, deviation, unknown
from effnet_kernels.fusion.lowering import ChainSpec, check_convolution, lower_chain, lower_excitation, lower_layer
from effnet_kernels.fusion.spec import Activation, Chain, Excitation, Gate, Layer, Padding
from effnet_kernels.models.features import Features

Entry = TypeVar("Entry")
Adapter = Callable[[nn.Module], ChainSpec]
"""A function that reads a block as a chain; it raises :class:`~effnet_kernels.fusion.inspection.Unsupported`."""

BlockReader = Callable[[str, nn.Module], Chain]
"""A function that reads a block of any package; it raises ValueError with the given name for an unknown one."""


class NetworkParts(NamedTuple):
    """A network's parts, by their names in the model.

    Attributes:
        stem: the first convolution.
        stages: the blocks, in groups whose last outputs are the model's own feature maps.
        head: the convolution behind the stages, or None.
        tail: the modules that the model applies to the last map, in order, by names; None where it returns maps.
        maps: which outputs the model returns of the stem (0) and the stages (1, 2, ...); None where it classifies.
        image_first: whether the image is the first of the maps that it returns.
    """

    stem: tuple[str, Chain]
    stages: list[list[tuple[str, Chain]]]
    head: tuple[str, Chain] | None
    tail: Mapping[str, nn.Module] | None
    maps: list[int] | None
    image_first: bool = False


class NetworkAdapter(NamedTuple):
    """A class of networks: the function that reads them, and the methods that it takes for the class's own."""

    read: Callable[[Any, BlockReader], NetworkParts]
    methods: tuple[str, ...]


def look_up(kind: type, table: Mapping[str, Entry], methods: Collection[str] = ("forward",)) -> Entry | None:
    """The table's entry for a class, or for the class that it inherits these methods from."""
    for base in kind.__mro__:
        entry = table.get(name_of(base))
        if entry is not None or any(method in base.__dict__ for method in methods):
            return entry
    return None


def name_of(kind: type) -> str:
    """A class's full name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that compute nothing themselves."""
    wrappers = {
        "torch.nn.parallel.data_parallel.DataParallel": "module",
        "torch.nn.parallel.distributed.DistributedDataParallel": "module",
        "torch.optim.swa_utils.AveragedModel": "module",
        "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    }
    while (name := wrappers.get(name_of(type(model)))) is not None:
        # A compiled model's forward is an attribute of the instance.
        if model._forward_hooks or model._forward_pre_hooks:
            raise ValueError(f"the {type(model).__name__} has a hook, which only its own call would fire")
        model = model.get_submodule(name)
    return model


def plain_child(block: nn.Module, path: str) -> nn.Module:
    """An inner module that computes what its class says."""
    module = block.get_submodule(path)
    reason = deviation(path, module)
    if reason is not None:
        raise Unsupported(reason)
    return module


def is_identity(block: nn.Module, path: str) -> bool:
    return type(plain_child(block, path)) is nn.Identity


def read_convolution(block: nn.Module, path: str) -> tuple[nn.Conv2d, int | Padding | Literal["same"]]:
    conv = plain_child(block, path)
    name = name_of(type(conv))
    padding: int | Padding | Literal["same"] = "same"
    if type(conv) is nn.Conv2d:
        padding = conv.padding[0] if isinstance(conv.padding[0], int) else 0
    elif name in _STATIC_PADDING:
        pad = plain_child(conv, "static_padding")
        if type(pad) not in (nn.Identity, nn.ZeroPad2d):
            raise unknown(f"{path}.static_padding", pad)
        padding = cast(Padding, tuple(pad.padding)) if isinstance(pad, nn.ZeroPad2d) else 0
    elif name not in _SAME_PADDING:
        raise unknown(path, conv)
    conv = cast(nn.Conv2d, conv)
    if type(conv) is not nn.Conv2d and tuple(conv.padding) != (0, 0):
        raise Unsupported(f"{path} pads by {conv.padding} beside the padding of its class")
    if conv._parameters.get("weight") is None:
        raise Unsupported(f"{path} has no weight of its own, as where parameters are sharded")
    check_convolution(path, conv)
    return conv, padding


def read_activation(block: nn.Module, path: str) -> Activation:
    module = plain_child(block, path)
    act = ACTIVATIONS_OF.get(type(module)) or _ACTIVATIONS.get(name_of(type(module)))
    if act is None:
        raise unknown(path, module)
    return act


def read_norm(block: nn.Module, path: str) -> tuple[nn.BatchNorm2d | nn.SyncBatchNorm, Activation]:
    """A BatchNorm, and the activation of one that brings its own."""
    norm = plain_child(block, path)
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return cast(nn.BatchNorm2d, norm), "none"
    if name_of(type(norm)) not in _NORMS_WITH_ACTIVATION:
        raise unknown(path, norm)
    if not is_identity(norm, "drop"):
        raise unknown(f"{path}.drop", norm.get_submodule("drop"))
    return cast(nn.BatchNorm2d, norm), read_activation(norm, "act")


def read_layer(block: nn.Module, conv: str, norm: str, act: Activation | None = None) -> Layer:
    convolution, padding = read_convolution(block, conv)
    batch_norm, own = read_norm(block, norm)
    if act is not None and own != "none":
        raise Unsupported(f"{norm} has an activation of its own, and another follows")
    return lower_layer(conv, convolution, batch_norm, own if act is None else act, padding)


def read_excitation(block: nn.Module, prefix: str, fc1: str, act: str, fc2: str, gate: str | None) -> Excitation:
    """Squeeze-and-excitation; without the name of a gate the block calls the sigmoid itself."""
    names = f"{prefix}{fc1}", f"{prefix}{fc2}"
    convs = [read_convolution(block, name)[0] for name in names]
    kind: Gate | None = "sigmoid"
    if gate is not None:
        module = plain_child(block, f"{prefix}{gate}")
        kind = GATES_OF.get(type(module)) or _GATES.get(name_of(type(module)))
        if kind is None:
            raise unknown(f"{prefix}{gate}", module)
    return lower_excitation(names, convs[0], convs[1], read_activation(block, f"{prefix}{act}"), kind or "sigmoid")


def chain_of(
    layers: list[Layer],
    excitation: Excitation | None = None,
    residual: object = False,
    drop_path: Callable[..., Tensor | None] | None = None,
) -> ChainSpec:
    """Layers, with squeeze-and-excitation before the last of them."""
    if excitation is not None:
        if len(layers) < 2:
            raise Unsupported("squeeze-and-excitation is not followed by a 1x1 convolution")
        layers[-2] = layers[-2]._replace(excitation=excitation)
    return ChainSpec(lower_chain(layers, bool(residual)), drop_path)


class Pair(nn.Module):
    """A convolution and its norm, and an activation that the norm does not bring, which a network calls in a row."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, input: Tensor) -> Tensor:
        y = self.norm(self.conv(input))
        return y if self.act is None else self.act(y)


def read_pair(pair: nn.Module) -> ChainSpec:
    return chain_of([read_layer(pair, "conv", "norm", None if pair.act is None else read_activation(pair, "act"))])


def blocks_of(name: str, module: nn.Module, read: BlockReader) -> Iterator[tuple[str, Chain]]:
    """The blocks that a module calls, by name: itself, or those in a sequence."""
    if original_of(type(module)) is nn.Sequential:
        for inner, child in children_of(name, module):
            yield from blocks_of(inner, child, read)
    else:
        yield name, read(name, module)


def children_of(name: str, sequence: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a sequence calls, by name; one may be there twice. Raises ValueError where it does more."""
    reason = deviation(name, sequence)
    if reason is None and original_of(type(sequence)) not in (nn.Sequential, Features):
        reason = f"{name} is a {type(sequence).__name__}, not a sequence of modules"
    if reason is not None:
        raise ValueError(reason)
    return [(f"{name}.{inner}", child) for inner, child in sequence._modules.items() if child is not None]


FLATTEN = nn.Flatten(1)

_LUKEMELAS = ("efficientnet_pytorch.utils", "segmentation_models_pytorch.encoders._efficientnet")
_SAME_PADDING = {"timm.layers.conv2d_same.Conv2dSame", *(f"{m}.Conv2dDynamicSamePadding" for m in _LUKEMELAS)}
_STATIC_PADDING = {f"{m}.Conv2dStaticSamePadding" for m in _LUKEMELAS}
_NORMS_WITH_ACTIVATION = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}
_GATES: dict[str, Gate] = {
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hardsigmoid",
}
_ACTIVATIONS: dict[str, Activation] = {
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.HardSwish": "hardswish",
    "efficientnet_pytorch.utils.Swish": "silu",
    "efficientnet_pytorch.utils.MemoryEfficientSwish": "silu",
}
