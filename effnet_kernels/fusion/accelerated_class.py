"""The classes that accelerate() makes of others, and the methods that make up a class's forward."""

from types import FunctionType
from typing import Any, ClassVar

from torch import nn


class Accelerated:
    """Mixed into a module's class by :func:`effnet_kernels.accelerate`.

    Attributes:
        original: the class that the module was of.
    """

    original: ClassVar[Any]


def is_accelerated(kind: type[nn.Module]) -> bool:
    """Whether a class is one that :func:`effnet_kernels.accelerate` made of another."""
    return issubclass(kind, Accelerated) and "original" in kind.__dict__


def original_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class itself, or the one that an accelerated class was made of."""
    return kind.__dict__["original"] if is_accelerated(kind) else kind


def own_call(kind: type[nn.Module]) -> str | None:
    """The method by which a class's modules are called otherwise than torch calls them, or None."""
    return next((name for name, method in CALL.items() if getattr(kind, name) is not method), None)


# torch's, as they were when this package was imported.
CALL = {name: getattr(nn.Module, name) for name in ("__call__", "_call_impl")}


def forward_methods(kind: type[nn.Module]) -> list[str]:
    """The names of a class's ``forward`` and of the methods of the class that it calls, where these are functions."""
    # Asking a class of TorchScript's for its forward raises an error, so the classes' dictionaries are read.
    forward = function_of_class(kind, "forward")
    if forward is None:
        return []
    return ["forward", *(name for name in forward.__code__.co_names if function_of_class(kind, name) is not None)]


def function_of_class(kind: type[nn.Module], name: str) -> FunctionType | None:
    """The function that a class has, or inherits from one below ``nn.Module``, under a name."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if name in base.__dict__:
            found = base.__dict__[name]
            return found if isinstance(found, FunctionType) else None
    return None
