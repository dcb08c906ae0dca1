"""Values for the calls inside a ``with`` block, wherever torch runs them."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


def _takes_references() -> bool:
    """Whether this version of torch drops a reference to a stashed object that it never took, as 2.9 to 2.11 do."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("effnet_kernels.probe", probe)
    takes = sys.getrefcount(probe) == before
    if takes:
        for given in (probe, None):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(given))
    torch._C._stash_obj_in_tls("effnet_kernels.probe", None)
    return takes


_TAKES_REFERENCES = _takes_references()


def _stash(key: str, value: object) -> None:
    if _TAKES_REFERENCES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


class ScopedValue(Generic[Value]):
    """A value that a ``with`` block of one thread has, as ``torch.no_grad()`` has its mode.

    Other threads do not see it, but for those in which autograd runs a backward pass that the block starts: a GPU's
    backward runs in a thread of its own, where a context variable has no value.
    """

    def __init__(self, name: str) -> None:
        self._key = f"effnet_kernels.{name}"
        # One entry for each block that is open in any thread, because asking torch takes longer than this list.
        self.open_blocks: list[None] = []

    def get(self) -> Value | None:
        """The value of the innermost block, or None outside of all."""
        if not self.open_blocks or not torch._C._is_key_in_tls(self._key):
            return None
        value: Value | None = torch._C._get_obj_in_tls(self._key)
        return value

    @contextlib.contextmanager
    def bound_to(self, value: Value) -> Iterator[None]:
        """The block in which the value is ``value``."""
        before = self.get()
        self.open_blocks.append(None)
        _stash(self._key, value)
        try:
            yield
        finally:
            _stash(self._key, before)
            self.open_blocks.pop()
