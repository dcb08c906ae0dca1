"""Blocks of other packages' networks, read as chains of convolutions.

Classes are known by name, so that nothing has to be installed that a model does not bring along.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from effnet_kernels.deferred import Activation, Gate, Padding
from effnet_kernels.fusion.cache import original_of
from effnet_kernels.fusion.inspection import Unsupported, deviation, methods_of, unknown
from effnet_kernels.fusion.lowering import (
    ACTIVATIONS_OF,
    GATES_OF,
    ChainSpec,
    check_convolution,
    lower_chain,
    lower_excitation,
    lower_layer,
)
from effnet_kernels.fusion.spec import Excitation, Layer
from effnet_kernels.modules.stochastic_depth import draw_factors

Entry = TypeVar("Entry")
Adapter = Callable[[nn.Module], ChainSpec]
"""What reads a block as a chain; raises :class:`~effnet_kernels.fusion.inspection.Unsupported`."""


def adapter_of(kind: type) -> Adapter | None:
    """What reads blocks of a class; None for other modules."""
    adapter = look_up(kind, _ADAPTERS)
    return None if adapter is None else partial(_read, adapter)


def is_block(kind: type) -> bool:
    """Whether a class is a block of another package's networks, and not a single layer such as their stem."""
    found = look_up(original_of(kind), _ADAPTERS)
    return found is not None and found not in (_read_pair, _read_torchvision_layer)


def _read(adapter: Adapter, block: nn.Module) -> ChainSpec:
    """What a block computes, where its class's forward is the one that the adapter knows."""
    patched = methods_of(type(block)).patched
    if patched is not None:
        raise Unsupported(f"its class had its {patched} replaced")
    try:
        return adapter(block)
    except AttributeError as missing:
        raise Unsupported(str(missing)) from missing


def look_up(kind: type, table: Mapping[str, Entry], methods: Collection[str] = ("forward",)) -> Entry | None:
    """What a table has under the name of a class, or of the one that the class derives these methods from."""
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


def _child(block: nn.Module, path: str) -> nn.Module:
    """An inner module that computes what its class says."""
    module = block.get_submodule(path)
    reason = deviation(path, module)
    if reason is not None:
        raise Unsupported(reason)
    return module


def _is_identity(block: nn.Module, path: str) -> bool:
    return type(_child(block, path)) is nn.Identity


def _convolution(block: nn.Module, path: str) -> tuple[nn.Conv2d, int | Padding | Literal["same"]]:
    conv = _child(block, path)
    name = name_of(type(conv))
    padding: int | Padding | Literal["same"] = "same"
    if type(conv) is nn.Conv2d:
        padding = conv.padding[0] if isinstance(conv.padding[0], int) else 0
    elif name in _STATIC_PADDING:
        pad = _child(conv, "static_padding")
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


def _activation(block: nn.Module, path: str) -> Activation:
    module = _child(block, path)
    act = ACTIVATIONS_OF.get(type(module)) or _ACTIVATIONS.get(name_of(type(module)))
    if act is None:
        raise unknown(path, module)
    return act


def _norm(block: nn.Module, path: str) -> tuple[nn.BatchNorm2d, Activation]:
    """A BatchNorm, and the activation of one that brings its own."""
    norm = _child(block, path)
    if type(norm) is nn.BatchNorm2d:
        return norm, "none"
    if name_of(type(norm)) != "timm.layers.norm_act.BatchNormAct2d":
        raise unknown(path, norm)
    if not _is_identity(norm, "drop"):
        raise unknown(f"{path}.drop", norm.get_submodule("drop"))
    return cast(nn.BatchNorm2d, norm), _activation(norm, "act")


def _layer(block: nn.Module, conv: str, norm: str, act: Activation | None = None) -> Layer:
    convolution, padding = _convolution(block, conv)
    batch_norm, own = _norm(block, norm)
    if act is not None and own != "none":
        raise Unsupported(f"{norm} has an activation of its own, and another follows")
    return lower_layer(conv, convolution, batch_norm, own if act is None else act, padding)


def _excitation(block: nn.Module, prefix: str, fc1: str, act: str, fc2: str, gate: str | None) -> Excitation:
    """Squeeze-and-excitation; without the name of a gate the block calls the sigmoid itself."""
    names = f"{prefix}{fc1}", f"{prefix}{fc2}"
    convs = [_convolution(block, name)[0] for name in names]
    kind: Gate | None = "sigmoid"
    if gate is not None:
        module = _child(block, f"{prefix}{gate}")
        kind = GATES_OF.get(type(module)) or _GATES.get(name_of(type(module)))
        if kind is None:
            raise unknown(f"{prefix}{gate}", module)
    return lower_excitation(names, convs[0], convs[1], _activation(block, f"{prefix}{act}"), kind or "sigmoid")


def _chain(
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


def _read_pair(pair: nn.Module) -> ChainSpec:
    return _chain([_layer(pair, "conv", "norm", None if pair.act is None else _activation(pair, "act"))])


# torchvision


def _torchvision_layer(block: nn.Module, prefix: str = "") -> Layer:
    """Conv2dNormActivation: a sequence of a convolution, a norm and, maybe, an activation."""
    names = list(block.get_submodule(prefix.rstrip("."))._modules)
    if names not in (["0", "1"], ["0", "1", "2"]):
        raise Unsupported(f"{prefix or 'it '}has the children {', '.join(names)}")
    return _layer(block, f"{prefix}0", f"{prefix}1", _activation(block, f"{prefix}2") if len(names) == 3 else "none")


def _torchvision_layers(block: nn.Module, sequence: str) -> tuple[list[Layer], Excitation | None]:
    layers: list[Layer] = []
    excitation = None
    if type(_child(block, sequence)) is not nn.Sequential:
        raise unknown(sequence, block.get_submodule(sequence))
    children = list(block.get_submodule(sequence)._modules)
    for index, child in enumerate(children):
        path = f"{sequence}.{child}"
        module = _child(block, path)
        name = name_of(type(module))
        if name == _TORCHVISION_LAYER:
            layers.append(_torchvision_layer(block, f"{path}."))
        elif type(module) is nn.Conv2d and index == len(children) - 2:
            layers.append(_layer(block, path, f"{sequence}.{children[-1]}", "none"))
            break
        elif name == "torchvision.ops.misc.SqueezeExcitation" and index == len(children) - 2:
            if type(_child(module, "avgpool")) is not nn.AdaptiveAvgPool2d:
                raise unknown(f"{path}.avgpool", module.get_submodule("avgpool"))
            excitation = _excitation(block, f"{path}.", "fc1", "activation", "fc2", "scale_activation")
        else:
            raise unknown(path, module)
    return layers, excitation


def _read_torchvision_layer(block: nn.Module) -> ChainSpec:
    return _chain([_torchvision_layer(block)])


def _read_torchvision(block: nn.Module, sequence: str) -> ChainSpec:
    """MBConv and FusedMBConv, and the inverted residuals of MobileNetV2 and V3."""
    layers, excitation = _torchvision_layers(block, sequence)
    drop_path = None
    if "stochastic_depth" in block._modules:
        drop = _child(block, "stochastic_depth")
        if name_of(type(drop)) != "torchvision.ops.stochastic_depth.StochasticDepth":
            raise unknown("stochastic_depth", drop)
        drop_path = partial(_stochastic_depth, drop)
    return _chain(layers, excitation, block.use_res_connect, drop_path)


def _stochastic_depth(drop: Any, x: Tensor) -> Tensor | None:
    if not drop.training or drop.p == 0.0:
        return None
    return draw_factors(x, drop.p, drop.mode == "row").flatten().expand(x.shape[0])


# timm


def _read_timm(block: nn.Module, *layers: tuple[str, str]) -> ChainSpec:
    """Convolutions with norms that bring their activation, one after another, with what may be between them."""
    if getattr(block, "conv_s2d", None) is not None:
        raise Unsupported("it has a space-to-depth convolution")
    if "aa" in block._modules and not _is_identity(block, "aa"):
        raise unknown("aa", block.get_submodule("aa"))
    excitation = None
    if "se" in block._modules and not _is_identity(block, "se"):
        excite = _child(block, "se")
        if name_of(type(excite)) != "timm.models._efficientnet_blocks.SqueezeExcite":
            raise unknown("se", excite)
        excitation = _excitation(block, "se.", "conv_reduce", "act1", "conv_expand", "gate")
    drop_path = None
    if not _is_identity(block, "drop_path"):
        drop = _child(block, "drop_path")
        if name_of(type(drop)) != "timm.layers.drop.DropPath":
            raise unknown("drop_path", drop)
        drop_path = partial(_drop_path, drop)
    return _chain([_layer(block, *names) for names in layers], excitation, block.has_skip, drop_path)


def _drop_path(drop: Any, x: Tensor) -> Tensor | None:
    if not drop.training or drop.drop_prob == 0.0:
        return None
    return draw_factors(x, drop.drop_prob, scaled=drop.scale_by_keep).flatten()


# efficientnet_pytorch, and its copy in segmentation_models_pytorch


def _read_lukemelas(block: nn.Module) -> ChainSpec:
    act = _activation(block, "_swish")
    arguments = getattr(block, "_block_args", None)
    if arguments is not None:
        expands, excites = arguments.expand_ratio != 1, block.has_se
        residual = block.id_skip and arguments.stride == 1 and arguments.input_filters == arguments.output_filters
    else:
        expands, excites, residual = block._has_expansion, block._has_se, block._has_drop_connect
    layers = [_layer(block, "_expand_conv", "_bn0", act)] if expands else []
    layers += [_layer(block, "_depthwise_conv", "_bn1", act), _layer(block, "_project_conv", "_bn2", "none")]
    excitation = _excitation(block, "", "_se_reduce", "_swish", "_se_expand", None) if excites else None
    return _chain(layers, excitation, residual, partial(_drop_connect, block.training))


def _drop_connect(training: bool, x: Tensor, drop_connect_rate: float | None = None) -> Tensor | None:
    # The draws of that package's own function.
    if not training or not drop_connect_rate:
        return None
    survival = 1 - drop_connect_rate
    drawn = torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return ((survival + drawn).floor() / survival).flatten()


_TORCHVISION_LAYER = "torchvision.ops.misc.Conv2dNormActivation"
_LUKEMELAS = ("efficientnet_pytorch.utils", "segmentation_models_pytorch.encoders._efficientnet")
_SAME_PADDING = {"timm.layers.conv2d_same.Conv2dSame", *(f"{m}.Conv2dDynamicSamePadding" for m in _LUKEMELAS)}
_STATIC_PADDING = {f"{m}.Conv2dStaticSamePadding" for m in _LUKEMELAS}
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
_TIMM = "timm.models._efficientnet_blocks"
_ADAPTERS: dict[str, Adapter] = {
    name_of(Pair): _read_pair,
    _TORCHVISION_LAYER: _read_torchvision_layer,
    "torchvision.models.efficientnet.MBConv": partial(_read_torchvision, sequence="block"),
    "torchvision.models.efficientnet.FusedMBConv": partial(_read_torchvision, sequence="block"),
    "torchvision.models.mobilenetv2.InvertedResidual": partial(_read_torchvision, sequence="conv"),
    "torchvision.models.mobilenetv3.InvertedResidual": partial(_read_torchvision, sequence="block"),
    f"{_TIMM}.InvertedResidual": lambda block: _read_timm(
        block, ("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")
    ),
    f"{_TIMM}.DepthwiseSeparableConv": lambda block: _read_timm(block, ("conv_dw", "bn1"), ("conv_pw", "bn2")),
    f"{_TIMM}.EdgeResidual": lambda block: _read_timm(block, ("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    f"{_TIMM}.ConvBnAct": lambda block: _read_timm(block, ("conv", "bn1")),
    "efficientnet_pytorch.model.MBConvBlock": _read_lukemelas,
    "segmentation_models_pytorch.encoders._efficientnet.MBConvBlock": _read_lukemelas,
}
ADAPTER_MODULES = frozenset(name.rpartition(".")[0] for name in _ADAPTERS)
"""Where the known classes are defined."""
