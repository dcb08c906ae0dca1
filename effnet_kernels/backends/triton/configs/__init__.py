"""From shape, dtype and architecture to a frozen launch configuration: rules, and tuned configs that override them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends.scoped_value import ScopedValue


class Target(NamedTuple):
    """The properties of a device that rules depend on."""

    backend: str  # "cuda" or "hip"
    architecture: int | str  # 90 for compute capability 9.0; "gfx942"
    multiprocessors: int

    def max_registers(self) -> int | None:
        """All registers that a thread can have, or None where the compiler takes no such limit."""
        return 255 if self.backend == "cuda" else None


# The target for tensors that are on no GPU, where launches are captured on the meta device or simulated. The H200 that
# the rules were timed on has these properties too.
H100 = Target("cuda", 90, 132)
_forced: ScopedValue[Target] = ScopedValue("target")


def target_of(x: Tensor) -> Target:
    """The target that configurations for ``x`` are chosen for: its device, or the target of :func:`use_target`."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return device_target(x.device) if x.is_cuda and not x.is_meta else H100


def device_target(device: torch.device) -> Target:
    """The target of a GPU."""
    return _target_of_device(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def use_target(target: Target) -> Iterator[None]:
    """Inside the ``with`` block configurations are chosen for ``target``, whatever device there is."""
    with _forced.bound_to(target):
        yield


@functools.cache
def _target_of_device(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)
