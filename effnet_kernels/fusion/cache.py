"""What was found out about a module's inside, kept for as long as the inside stays as it was.

Whether kernels can compute a module, and with which tensors, takes a hundred microseconds to find out; to see that
nothing has changed since takes a few. A change is anything that shows in the attributes, children, parameters, buffers,
hooks or classes of the module or of those inside it, or in the methods that are the forward of these classes.
"""

import operator
from types import FunctionType
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Finding = TypeVar("Finding")


class Switched:
    """Mixed into a module's class by :func:`effnet_kernels.accelerate`.

    Attributes:
        original: the class that the module was of.
    """

    original: ClassVar[Any]


def is_accelerated(kind: type[nn.Module]) -> bool:
    """Whether a class is one that :func:`effnet_kernels.accelerate` made of another."""
    return issubclass(kind, Switched) and "original" in kind.__dict__


def original_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class itself, or the one that an accelerated class was made of."""
    return kind.__dict__["original"] if is_accelerated(kind) else kind


def forward_methods(kind: type[nn.Module]) -> list[str]:
    """The names of a class's ``forward`` and of the methods of the class that it calls, where these are functions."""
    # Asking a class of TorchScript's for its forward raises an error, so the classes' dictionaries are read.
    forward = static_method(kind, "forward")
    if forward is None:
        return []
    return ["forward", *(name for name in forward.__code__.co_names if static_method(kind, name) is not None)]


def static_method(kind: type[nn.Module], name: str) -> FunctionType | None:
    """The function that a class has, or inherits from one below ``nn.Module``, under a name."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if name in base.__dict__:
            found = base.__dict__[name]
            return found if isinstance(found, FunctionType) else None
    return None


class Snapshot(Generic[Finding]):
    """A finding about ``module``, and everything that it may depend on."""

    def __init__(self, module: nn.Module, finding: Finding) -> None:
        # The module itself is not kept: its attributes are, so that it can be collected.
        inner = list(module.modules())[1:]
        self.finding = finding
        self.types = [type(m) for m in inner]
        # An accelerated block's own class is the one that it was switched from.
        kinds = {original_of(kind) for kind in (type(module), *self.types)}
        self.named_methods = [(kind, name) for kind in kinds for name in forward_methods(kind)]
        self.methods = [getattr(kind, name) for kind, name in self.named_methods]
        self.inner = inner
        self.attributes = [module.__dict__, *(m.__dict__ for m in inner)]
        self.values = [list(d.values()) for d in self.attributes]
        kinds_of_members = ("_modules", "_parameters", "_buffers")
        # What torch.jit.trace returns has none of them.
        self.members = [d[kind] for d in self.attributes for kind in kinds_of_members if d.get(kind)]
        self.tensors = [t for d in self.members for t in d.values()]
        self.hooks = [
            getattr(m, kind)
            for m in inner
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]

        # Hooks come and go inside of the same dictionaries, which do not show it.
        self.hooked = any(self.hooks)

    def holds(self) -> bool:
        """Whether all is as it was. Hooks on the module itself fire by themselves and do not matter."""
        if self.hooked or any(self.hooks) or list(map(type, self.inner)) != self.types:
            return False
        if [getattr(kind, name) for kind, name in self.named_methods] != self.methods:
            return False
        now = [t for d in self.members for t in d.values()]
        if len(now) != len(self.tensors) or not all(map(operator.is_, now, self.tensors)):
            return False
        try:
            # Lists compare their elements by identity first.
            return [list(d.values()) for d in self.attributes] == self.values
        except RuntimeError:  # a tensor was replaced by another, and tensors compare elementwise
            return False


class Snapshots(Generic[Finding]):
    """The snapshots of many modules."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, Snapshot[Finding]] = WeakKeyDictionary()

    def get(self, module: nn.Module) -> Finding | None:
        """What was found about the module, if it still holds."""
        snapshot = self._of.get(module)
        return snapshot.finding if snapshot is not None and snapshot.holds() else None

    def keep(self, module: nn.Module, finding: Finding) -> Finding:
        self._of[module] = Snapshot(module, finding)
        return finding
