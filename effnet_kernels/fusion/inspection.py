"""Whether a module computes what its class says, so that a kernel can compute it instead."""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from effnet_kernels.backends import select
from effnet_kernels.backends.base import PrimitivesBackend, has_depthwise, has_excitation
from effnet_kernels.fusion.accelerated_class import forward_methods, function_of_class, original_of, own_call
from effnet_kernels.fusion.spec import Activation, Chain, Gate

# A plain tuple, because a tracer cannot unpack a named one that a constant function returns.
ForwardMethods = tuple[tuple[str, ...], str | None]
Module = TypeVar("Module", bound=nn.Module)

ACTIVATIONS_OF: dict[type[nn.Module], Activation] = {
    nn.Identity: "none",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}
GATES_OF: dict[type[nn.Module], Gate] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
# Modules that are known with their constructors' default settings alone.
ELEMENTWISE = {*ACTIVATIONS_OF, *GATES_OF} - {nn.Identity}


class Unsupported(Exception):
    """A part of a module that no kernel computes; the text is the reason why the module runs as torch has it."""


def checked(name: str, module: nn.Module | None, kinds: Collection[type[Module]]) -> Module:
    """An inner module of one of some classes that computes what its class says; raises Unsupported for another."""
    if module is not None and type(module) in kinds:
        reason = deviation(name, module)
        if reason is None:
            return module  # type: ignore[return-value]
        raise Unsupported(reason)
    raise unknown(name, module)


def unknown(name: str, module: nn.Module | None) -> Unsupported:
    """The error for a module of a class that no kernel computes."""
    return Unsupported(f"{name} is a {type(module).__name__}, which no kernel computes")


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, accelerated or not, and computes what its class says."""
    return module is not None and original_of(type(module)) in kinds and deviation("it", module) is None


def has_hook(module: nn.Module) -> bool:
    """Whether a hook fires at calls of the module, or at the backward pass of one."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def deviation(name: str, module: nn.Module) -> str | None:
    """Why a module computes something else than its class says (a hook, a replaced method, a setting), or None."""
    if has_hook(module):
        return f"{name} has a hook, which only its own call would fire"
    names, patched = methods_of(type(module))
    for method in ("_call_impl", *names):
        if method in module.__dict__:
            return f"{name} had its {method} replaced"
    if patched is not None:
        return f"the class of {name} had its {patched} replaced"
    setting = _unknown_setting(module)
    if setting is not None:
        return f"{name} has {setting}, which no kernel computes"
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"{name} holds a {type(parameter).__name__}, not a plain parameter"
    # A tracer has no answer to this; it traces torch's own operators, which have.
    if not torch.compiler.is_compiling():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_neg():
                return f"{name} holds a tensor that is negated lazily"
    return None


def missing_kernel(backend: PrimitivesBackend, chains: Iterable[Chain]) -> str | None:
    """Which of the chains' parts the kernels of a backend do not have, or None."""
    for layer in (layer for chain in chains for layer in chain.layers):
        if layer.kind == "depthwise" and not has_depthwise(backend, layer.kernel_size, layer.stride):
            return f"no depthwise kernel of size {layer.kernel_size} and stride {layer.stride}"
        if layer.excitation is not None and not has_excitation(backend, layer.excitation.reduce_weight.shape[0]):
            return (
                f"no squeeze-and-excitation with a hidden layer of {layer.excitation.reduce_weight.shape[0]} channels"
            )
    return None


def promoted_residual(chains: Sequence[Chain], call: select.Call) -> str | None:
    """Why torch has to add the residual of the first chain, or None: under autocast a chain's output has its dtype.

    The map that a residual is added to has the dtype of autocast, and their sum the wider one of both.
    """
    autocast = select.autocast_dtype(call.device)
    if not chains[0].residual or autocast is None or call.dtype is autocast:
        return None
    return f"the residual in {str(call.dtype).removeprefix('torch.')} is added to a map in autocast's dtype"


# By class: what was found, and the methods as they were then.
_methods: WeakKeyDictionary[type, tuple[ForwardMethods, list[object]]] = WeakKeyDictionary()


# A tracer cannot follow these questions.
@select.constant_when_traced
def methods_of(kind: type[nn.Module]) -> ForwardMethods:
    """The methods that make up a class's forward, and what is foreign among them.

    Returns the names of ``forward`` and of the methods of the class that it calls, and the first of them that was
    defined in another module than its class, or that is no function; or the one by which a call is not torch's own; or
    None. An accelerated class has the methods of the class that it was made of.
    """
    kind = original_of(kind)
    call = own_call(kind)
    if call is not None:
        return (), call
    known = _methods.get(kind)
    if known is not None and [getattr(kind, name) for name in known[0][0]] == known[1]:
        return known[0]
    names = forward_methods(kind)
    patched = next((name for name in names if _is_foreign(kind, name)), None if names else "forward")
    found = tuple(names), patched
    _methods[kind] = found, [getattr(kind, name) for name in names]
    return found


def _is_foreign(kind: type[nn.Module], name: str) -> bool:
    method, owner = function_of_class(kind, name), next(base for base in kind.__mro__ if name in base.__dict__)
    # Not method.__module__, which functools.wraps copies from what it wraps.
    return method is None or method.__globals__.get("__name__") != owner.__module__


def _unknown_setting(module: nn.Module) -> str | None:
    """A setting by which a module computes something else than others of its class, or None."""
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1), [1, 1]):
        return f"the output size {module.output_size}"
    if isinstance(module, nn.Conv2d):
        for setting in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(module, setting)
            # torch takes a number too, where somebody sets one.
            if not isinstance(value, str) and (not isinstance(value, (tuple, list)) or len(value) != 2):
                return f"the {setting} {value!r}, which is no pair"
    if type(module) in ELEMENTWISE:
        for setting, usual in _settings_of(type(module)):
            value = getattr(module, setting)
            if value != usual:
                return f"the {setting} {value!r}"
    return None


# A tracer cannot follow the making of a module.
@select.constant_when_traced
def _settings_of(kind: type[nn.Module]) -> tuple[tuple[str, object], ...]:
    """The attributes that a class's constructor sets, with their defaults, but for those that compute nothing."""
    attributes = vars(kind()).items()
    return tuple((name, value) for name, value in attributes if name[0] != "_" and name not in ("training", "inplace"))
