"""Blocks of other packages' networks, read as chains of convolutions.

Classes are known by name, so that nothing has to be installed that a model does not bring along.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from effnet_kernels.deferred import Activation, Gate, Padding
from effnet_kernels.modules.chain import ConvNorm, ExcitationLayers, Parts, convolution_obstacle, squeeze_layer_obstacle
from effnet_kernels.modules.operator_module import ACTIVATION_NAMES, GATE_NAMES, children_obstacle, methods_of
from effnet_kernels.modules.snapshot import original_of
from effnet_kernels.modules.stochastic_depth import draw_factors

Entry = TypeVar("Entry")
Reader = Callable[[nn.Module], Parts]
"""What reads a block; raises :class:`UnknownPart`."""


class UnknownPart(Exception):
    """A part of a block that the operators do not know."""


def reader_of(kind: type) -> Reader | None:
    """What reads blocks of a class; None for other modules."""
    reader = look_up(kind, _READERS)
    return None if reader is None else partial(_read, reader)


def is_block(kind: type) -> bool:
    """Whether a class is a block of another package's networks, and not a single layer such as their stem."""
    found = look_up(original_of(kind), _READERS)
    return found is not None and found not in (_read_pair, _read_torchvision_layer)


def _read(reader: Reader, block: nn.Module) -> Parts:
    """The parts of a block, if they are a chain whose tensors fit one another."""
    patched = methods_of(type(block)).patched
    if patched is not None:
        raise UnknownPart(f"its class had its {patched} replaced")
    parts = reader(block)
    if not parts.layers:
        raise UnknownPart("it has no convolutions")
    for index, layer in enumerate(parts.layers[1:]):
        if layer.kind() == "dense":
            raise UnknownPart(f"convolution {index + 1} is neither a 1x1 nor a depthwise one")
    if parts.excitation is not None and (len(parts.layers) < 2 or parts.layers[-1].kind() != "pointwise"):
        raise UnknownPart("squeeze-and-excitation is not followed by a 1x1 convolution")
    misfit = parts.misfit()
    if misfit is not None:
        raise UnknownPart(misfit)
    return parts


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
    """An inner module that does nothing but its forward."""
    module = block.get_submodule(path)
    obstacle = children_obstacle([(path, module, (type(module),))])
    if obstacle is not None:
        raise UnknownPart(obstacle)
    return module


def _unknown(path: str, module: nn.Module) -> UnknownPart:
    return UnknownPart(f"{path} is a {type(module).__name__}, which the operators do not know")


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
            raise _unknown(f"{path}.static_padding", pad)
        padding = cast(Padding, tuple(pad.padding)) if isinstance(pad, nn.ZeroPad2d) else 0
    elif name not in _SAME_PADDING:
        raise _unknown(path, conv)
    conv = cast(nn.Conv2d, conv)
    if type(conv) is not nn.Conv2d and tuple(conv.padding) != (0, 0):
        raise UnknownPart(f"{path} pads by {conv.padding} beside the padding of its class")
    if conv._parameters.get("weight") is None:
        raise UnknownPart(f"{path} has no weight of its own, as where parameters are sharded")
    obstacle = convolution_obstacle(path, conv)
    if obstacle is not None:
        raise UnknownPart(obstacle)
    return conv, padding


def _activation(block: nn.Module, path: str) -> Activation:
    module = _child(block, path)
    act = ACTIVATION_NAMES.get(type(module)) or _ACTIVATIONS.get(name_of(type(module)))
    if act is None:
        raise _unknown(path, module)
    return act


def _norm(block: nn.Module, path: str) -> tuple[nn.BatchNorm2d, Activation]:
    """A BatchNorm, and the activation of one that brings its own."""
    norm = _child(block, path)
    if type(norm) is nn.BatchNorm2d:
        return norm, "none"
    if name_of(type(norm)) != "timm.layers.norm_act.BatchNormAct2d":
        raise _unknown(path, norm)
    if not _is_identity(norm, "drop"):
        raise _unknown(f"{path}.drop", norm.get_submodule("drop"))
    return cast(nn.BatchNorm2d, norm), _activation(norm, "act")


def _layer(block: nn.Module, conv: str, norm: str, act: Activation | None = None) -> ConvNorm:
    convolution, padding = _convolution(block, conv)
    batch_norm, own = _norm(block, norm)
    if act is not None and own != "none":
        raise UnknownPart(f"{norm} has an activation of its own, and another follows")
    return ConvNorm(convolution, batch_norm, own if act is None else act, padding)


def _excitation(block: nn.Module, fc1: str, act: str, fc2: str, gate: str | None) -> ExcitationLayers:
    """Squeeze-and-excitation; without the name of a gate the block calls the sigmoid itself."""
    first, second = _convolution(block, fc1)[0], _convolution(block, fc2)[0]
    for path, conv in ((fc1, first), (fc2, second)):
        obstacle = squeeze_layer_obstacle(path, conv)
        if obstacle is not None:
            raise UnknownPart(obstacle)
    module = None if gate is None else _child(block, gate)
    kind = "sigmoid" if module is None else GATE_NAMES.get(type(module)) or _GATES.get(name_of(type(module)))
    if kind is None:
        raise _unknown(cast(str, gate), cast(nn.Module, module))
    return ExcitationLayers(first, second, _activation(block, act), kind)


class Pair(nn.Module):
    """A convolution and its norm, and an activation that the norm does not bring, which a network calls in a row."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, input: Tensor) -> Tensor:
        y = self.norm(self.conv(input))
        return y if self.act is None else self.act(y)


def _read_pair(pair: nn.Module) -> Parts:
    return Parts((_layer(pair, "conv", "norm", None if pair.act is None else _activation(pair, "act")),))


# torchvision


def _torchvision_layer(block: nn.Module, prefix: str = "") -> ConvNorm:
    """Conv2dNormActivation: a sequence of a convolution, a norm and, maybe, an activation."""
    names = list(block.get_submodule(prefix.rstrip("."))._modules)
    if names not in (["0", "1"], ["0", "1", "2"]):
        raise UnknownPart(f"{prefix or 'it '}has the children {', '.join(names)}")
    return _layer(block, f"{prefix}0", f"{prefix}1", _activation(block, f"{prefix}2") if len(names) == 3 else "none")


def _torchvision_layers(block: nn.Module, sequence: str) -> tuple[tuple[ConvNorm, ...], ExcitationLayers | None]:
    layers: list[ConvNorm] = []
    excitation = None
    if type(_child(block, sequence)) is not nn.Sequential:
        raise _unknown(sequence, block.get_submodule(sequence))
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
                raise _unknown(f"{path}.avgpool", module.get_submodule("avgpool"))
            excitation = _excitation(module, "fc1", "activation", "fc2", "scale_activation")
        else:
            raise _unknown(path, module)
    return tuple(layers), excitation


def _read_torchvision_layer(block: nn.Module) -> Parts:
    return Parts((_torchvision_layer(block),))


def _read_torchvision(block: nn.Module, sequence: str) -> Parts:
    """MBConv and FusedMBConv, and the inverted residuals of MobileNetV2 and V3."""
    layers, excitation = _torchvision_layers(block, sequence)
    keep = None
    if "stochastic_depth" in block._modules:
        drop = _child(block, "stochastic_depth")
        if name_of(type(drop)) != "torchvision.ops.stochastic_depth.StochasticDepth":
            raise _unknown("stochastic_depth", drop)
        keep = partial(_stochastic_depth, drop)
    return Parts(layers, excitation, bool(block.use_res_connect), keep)


def _stochastic_depth(drop: Any, x: Tensor) -> Tensor | None:
    if not drop.training or drop.p == 0.0:
        return None
    return draw_factors(x, drop.p, drop.mode == "row").flatten().expand(x.shape[0])


# timm


def _read_timm(block: nn.Module, *layers: tuple[str, str]) -> Parts:
    """Convolutions with norms that bring their activation, one after another, with what may be between them."""
    if getattr(block, "conv_s2d", None) is not None:
        raise UnknownPart("it has a space-to-depth convolution")
    if "aa" in block._modules and not _is_identity(block, "aa"):
        raise _unknown("aa", block.get_submodule("aa"))
    excitation = None
    if "se" in block._modules and not _is_identity(block, "se"):
        excite = _child(block, "se")
        if name_of(type(excite)) != "timm.models._efficientnet_blocks.SqueezeExcite":
            raise _unknown("se", excite)
        excitation = _excitation(excite, "conv_reduce", "act1", "conv_expand", "gate")
    keep = None
    if not _is_identity(block, "drop_path"):
        drop = _child(block, "drop_path")
        if name_of(type(drop)) != "timm.layers.drop.DropPath":
            raise _unknown("drop_path", drop)
        keep = partial(_drop_path, drop)
    read = tuple(_layer(block, conv, norm) for conv, norm in layers)
    return Parts(read, excitation, bool(block.has_skip), keep)


def _drop_path(drop: Any, x: Tensor) -> Tensor | None:
    if not drop.training or drop.drop_prob == 0.0:
        return None
    return draw_factors(x, drop.drop_prob, scaled=drop.scale_by_keep).flatten()


# efficientnet_pytorch, and its copy in segmentation_models_pytorch


def _read_lukemelas(block: nn.Module) -> Parts:
    act = _activation(block, "_swish")
    arguments = getattr(block, "_block_args", None)
    if arguments is not None:
        expands, excites = arguments.expand_ratio != 1, block.has_se
        residual = block.id_skip and arguments.stride == 1 and arguments.input_filters == arguments.output_filters
    else:
        expands, excites, residual = block._has_expansion, block._has_se, block._has_drop_connect
    layers = [_layer(block, "_expand_conv", "_bn0", act)] if expands else []
    layers += [_layer(block, "_depthwise_conv", "_bn1", act), _layer(block, "_project_conv", "_bn2", "none")]
    excitation = _excitation(block, "_se_reduce", "_swish", "_se_expand", None) if excites else None
    return Parts(tuple(layers), excitation, bool(residual), partial(_drop_connect, block.training))


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
_READERS: dict[str, Reader] = {
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
READER_MODULES = frozenset(name.rpartition(".")[0] for name in _READERS)
"""Where the known classes are defined."""
