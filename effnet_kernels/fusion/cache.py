"""What was found out about a module's inside, kept for as long as the inside stays as it was.

Whether kernels can compute a module, and with which tensors, takes a hundred microseconds to find out; to see that
nothing has changed since takes a few. A change is anything that shows in the attributes, children, parameters, buffers,
hooks or classes of the module or of those inside it, or in the methods that are the forward of these classes.
"""

import copy
import operator
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import nn

from effnet_kernels.fusion.accelerated_class import CALL, forward_methods, original_of

Finding = TypeVar("Finding")

_ATTRIBUTE = "_effnet_kernels_kept"
_LONGEST_SETTING = 64


class _Kept(dict[Any, Any]):
    """What is kept of one module. A copy of it is an empty dictionary, of a class that torch.load allows."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()


def kept_of(module: nn.Module) -> dict[Any, Any]:
    """What is kept of a module, by who keeps it; it lives as long as the module, and copies of that begin anew.

    It is an attribute of the module: in a table of all modules, whose keys are weak, a finding that leads back to its
    module, through a hook for example, would keep it alive for ever.
    """
    kept = module.__dict__.get(_ATTRIBUTE)
    if type(kept) is not _Kept or kept.module() is not module:
        kept = module.__dict__[_ATTRIBUTE] = _Kept(module)
    return kept


def forget(module: nn.Module) -> None:
    """Removes what is kept of a module."""
    module.__dict__.pop(_ATTRIBUTE, None)


class Snapshot(Generic[Finding]):
    """A finding about ``module``, and everything that it may depend on.

    It does not refer to the module, which would then be freed by the garbage collector alone, not as soon as it is
    deleted.
    """

    def __init__(self, module: nn.Module, finding: Finding) -> None:
        inner = list(module.modules())[1:]
        self.finding = finding
        self.types = [type(m) for m in inner]
        # An accelerated block's own class is the one that it was switched from.
        kinds = {original_of(kind) for kind in (type(module), *self.types)}
        self.named_methods = [(kind, name) for kind in kinds for name in (*CALL, *forward_methods(kind))]
        self.methods = [getattr(kind, name) for kind, name in self.named_methods]
        self.inner = inner
        self.attributes = [m.__dict__ for m in inner]
        self.values = [_own_values(module), *(list(d.values()) for d in self.attributes)]
        # Those that may be changed in place.
        self.lists = [(found, copy.deepcopy(found)) for found in _settings_in_lists(self.values)]
        kinds_of_members = ("_modules", "_parameters", "_buffers")
        # What torch.jit.trace returns has none of them.
        attributes = [module.__dict__, *self.attributes]
        dictionaries = [d[kind] for d in attributes for kind in kinds_of_members if kind in d]
        self.empty = [d for d in dictionaries if not d]
        self.dictionaries = [d for d in dictionaries if d]
        self.members = [member for d in self.dictionaries for member in d.values()]
        self.hooks = [
            getattr(m, kind)
            for m in inner
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]

        # Hooks come and go inside of the same dictionaries, which do not show it.
        self.hooked = any(self.hooks)

    def holds(self, module: nn.Module) -> bool:
        """Whether all is as it was. Hooks on the module itself fire by themselves and do not matter."""
        if self.hooked or any(self.hooks) or list(map(type, self.inner)) != self.types:
            return False
        if [getattr(kind, name) for kind, name in self.named_methods] != self.methods:
            return False
        members = [member for d in self.dictionaries for member in d.values()]
        if len(members) != len(self.members) or not all(map(operator.is_, members, self.members)) or any(self.empty):
            return False
        try:
            # Lists compare their elements by identity first.
            if [_own_values(module), *(list(d.values()) for d in self.attributes)] != self.values:
                return False
            return all(now == before for now, before in self.lists)
        except Exception:  # a value was replaced by another, and they cannot be compared, as arrays cannot
            return False


def _own_values(module: nn.Module) -> list[Any]:
    # A list first, because another thread may change the dictionary.
    return [value for name, value in list(module.__dict__.items()) if name != _ATTRIBUTE]


def _settings_in_lists(values: Iterable[Any], depth: int = 4) -> Iterator[list[Any]]:
    """The short lists of numbers and strings among values, and inside of lists and tuples, as settings may be."""
    for value in values:
        if isinstance(value, list) and _is_setting(value, depth):
            yield value
        elif isinstance(value, list | tuple) and depth > 0:
            yield from _settings_in_lists(value, depth - 1)


def _is_setting(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= _LONGEST_SETTING and all(_is_setting(inner, depth - 1) for inner in value)
    return value is None or isinstance(value, bool | int | float | str)


class Snapshots(Generic[Finding]):
    """Findings of one kind about many modules."""

    def get(self, module: nn.Module) -> Finding | None:
        """What was found about the module, if it still holds."""
        snapshot: Snapshot[Finding] | None = kept_of(module).get(self)
        return snapshot.finding if snapshot is not None and snapshot.holds(module) else None

    def last(self, module: nn.Module) -> Finding | None:
        """What was found about the module the last time, whether it holds or not."""
        snapshot: Snapshot[Finding] | None = kept_of(module).get(self)
        return None if snapshot is None else snapshot.finding

    def keep(self, module: nn.Module, finding: Finding) -> Finding:
        kept = kept_of(module)
        kept[self] = Snapshot(module, finding)
        return finding
