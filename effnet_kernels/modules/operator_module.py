"""Modules with two ways to compute: their inner modules as torch has them, or this package's operators."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from effnet_kernels import cpu, dispatch
from effnet_kernels.deferred import Activation, Gate
from effnet_kernels.dispatch import Backend
from effnet_kernels.modules.snapshot import Snapshots, forward_methods, original_of, static_method
from effnet_kernels.primitives import PrimitivesBackend

ACTIVATION_NAMES: dict[type[nn.Module], Activation] = {
    nn.Identity: "none",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}
GATE_NAMES: dict[type[nn.Module], Gate] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}


class Inspection:
    """What a module's inside means for the operators: an obstacle or None, and plans made from it."""

    def __init__(self, obstacle: str | None) -> None:
        self.obstacle = obstacle
        self.plans: dict[Hashable, object] = {}


Plan = TypeVar("Plan")
_inspections: Snapshots[Inspection] = Snapshots()


class OperatorModule(nn.Module):
    """Base of the modules whose forward runs on the operators where :func:`effnet_kernels.dispatch.choose` says so.

    A subclass has ``forward_modules`` (the textbook), ``forward_chain`` (one fused chain on a backend's primitives, of
    an input in channels-last strides), ``find_obstacle`` and ``kernel_obstacle``. The output has the input's memory
    format.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Two conditions, because TorchScript compiles what follows an ``and``.
        if not torch.jit.is_scripting():
            backend = dispatch.choose(self, input).backend
            if backend != "torch":
                output = self.forward_chain(input.contiguous(memory_format=torch.channels_last), backend)
                return output.contiguous(memory_format=memory_format(input))
        return self.forward_modules(input)

    def forward_modules(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_chain(self, input: Tensor, backend: PrimitivesBackend) -> Tensor:
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why the operators cannot stand for the inner modules, or None."""
        if torch.compiler.is_compiling():
            return self.find_obstacle()
        found = _inspections.get(self)
        if found is None:
            found = _inspections.keep(self, Inspection(self.find_obstacle()))
        return found.obstacle

    def find_obstacle(self) -> str | None:
        """:meth:`obstacle`, found out anew."""
        raise NotImplementedError

    def plan(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What ``make`` returns, kept under ``key`` until something inside the module changes."""
        found = None if torch.compiler.is_compiling() else _inspections.latest(self)
        if found is None:
            return make()
        if key not in found.plans:
            found.plans[key] = make()
        return cast(Plan, found.plans[key])

    def kernel_obstacle(self, backend: Backend) -> str | None:
        """Why the kernels of ``backend`` would not help this module, or None."""
        return None

    def kernel_reason(self, backend: Backend) -> str:
        """What the kernels of ``backend`` compute of this module."""
        return kernels(backend)


@dispatch.constant_when_traced
def kernels(backend: Backend) -> str:
    """The kernels of a backend by name."""
    if backend == "reference":
        return "the reference, in plain PyTorch"
    return f"fused native kernels ({cpu.isa()})" if backend == "cpu" else "fused Triton kernels"


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where the strides are that and nothing else (a 1x1 map's are both), else contiguous."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


Child = tuple[str, nn.Module | None, tuple[type[nn.Module], ...]]
"""The name of an inner module, the module, and the classes that an operator can stand for."""


def children_obstacle(children: Iterable[Child]) -> str | None:
    """Why an operator cannot stand for one of the inner modules: another class, a hook or forward of the user's."""
    for name, module, expected in children:
        if type(module) not in expected or module is None:
            return f"{name} is a {type(module).__name__}, which the operators do not know"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has a hook, which only its own call would fire"
        names, patched = methods_of(type(module))
        for method in ("_call_impl", *names):
            if method in module.__dict__:
                return f"{name} had its {method} replaced"
        if patched is not None:
            return f"the class of {name} had its {patched} replaced"
        setting = _unknown_setting(module)
        if setting is not None:
            return f"{name} has {setting}, which the operators do not know"
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


class ForwardMethods(NamedTuple):
    """The methods that make up a class's forward.

    Attributes:
        names: ``forward``, and the methods of the class that it calls.
        patched: one that was defined in another module than its class, or that is no function, or None.
    """

    names: tuple[str, ...]
    patched: str | None


# By class: what was found, and the methods as they were then.
_methods: WeakKeyDictionary[type, tuple[ForwardMethods, list[object]]] = WeakKeyDictionary()


# A tracer cannot follow these questions.
@dispatch.constant_when_traced
def methods_of(kind: type[nn.Module]) -> ForwardMethods:
    """The methods that make up a class's forward; for an accelerated class, those of the class that it was made of."""
    kind = original_of(kind)
    known = _methods.get(kind)
    if known is not None and [getattr(kind, name) for name in known[0].names] == known[1]:
        return known[0]
    names = forward_methods(kind)
    patched = next((name for name in names if _is_foreign(kind, name)), None if names else "forward")
    found = ForwardMethods(tuple(names), patched)
    _methods[kind] = found, [getattr(kind, name) for name in names]
    return found


def _is_foreign(kind: type[nn.Module], name: str) -> bool:
    method, owner = static_method(kind, name), next(base for base in kind.__mro__ if name in base.__dict__)
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
            if not isinstance(value, str) and (not isinstance(value, tuple | list) or len(value) != 2):
                return f"the {setting} {value!r}, which is no pair"
    if type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0):
        return f"the bounds {module.min_val} and {module.max_val}"
    return None
