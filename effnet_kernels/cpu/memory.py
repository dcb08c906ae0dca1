"""Tensors for the native kernels to write, the addresses that they take, and how they run.

Large maps come from a pool that keeps the memory of those that went: see ``csrc/pool.h``.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from effnet_kernels.cpu.extension import extension
from effnet_kernels.deferred import ACTIVATIONS, OutputGradient, Prologue
from effnet_kernels.reference.deferred import fold_statistics

ACTIVATION_INDEX = {act: index for index, act in enumerate(ACTIVATIONS)}
# The system's allocator keeps what is smaller than this itself.
_POOLED_BYTES = 128 * 1024

_isa: ContextVar[str | None] = ContextVar("effnet_kernels_isa", default=None)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """The kernels of one instruction set for the calls inside the ``with`` block, those that only tests reach included.

    Calls raise ValueError for a name that is not in the table of kernels or that this machine does not support.
    """
    token = _isa.set(name)
    try:
        yield
    finally:
        _isa.reset(token)


def execution() -> tuple[int, str | None]:
    """How many threads a call may use, and the instruction set where one is forced."""
    return torch.get_num_threads(), _isa.get()


def empty(*shape: int) -> Tensor:
    """float32, contiguous, not initialised."""
    return torch.empty(shape, dtype=torch.float32)


def empty_map(samples: int, channels: int, height: int, width: int) -> Tensor:
    """[N, C, H, W] in channels-last strides, float32, not initialised."""
    count = samples * channels * height * width
    if 4 * count < _POOLED_BYTES:
        flat = torch.empty(count, dtype=torch.float32)
    else:
        flat = torch.frombuffer(extension().PooledBytes(4 * count), dtype=torch.float32)
    return flat.as_strided(
        (samples, channels, height, width), (channels * height * width, 1, width * channels, channels)
    )


def release_memory() -> None:
    """Gives the memory that is kept for maps to come back to the system."""
    extension().release_memory()


def check_float_cpu(name: str, tensor: Tensor) -> None:
    """The kernels read raw memory as fp32."""
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(f"{name}: expected a float32 tensor on the CPU, got {tensor.dtype} on {tensor.device}")


def map_address(name: str, x: Tensor | None) -> int:
    """Address of [N, C, H, W] in channels-last strides, 0 for None."""
    if x is None:
        return 0
    check_float_cpu(name, x)
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name}: expected [N, C, H, W] in channels-last strides, "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    return x.data_ptr()


def address(name: str, tensor: Tensor | None, *shape: int) -> int:
    """Address of a contiguous vector or matrix of this shape, 0 for None."""
    if tensor is None:
        return 0
    check_float_cpu(name, tensor)
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected shape {shape}, contiguous, got {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def prologue_addresses(prologue: Prologue, samples: int, channels: int) -> tuple[int, int, int, int]:
    scale, shift, act, gate, statistics = prologue
    if statistics is not None or (scale is None) != (shift is None):
        raise ValueError("prologue: expected scale and shift together and no statistics")
    return (
        address("scale", scale, channels),
        address("shift", shift, channels),
        address("gate", gate, samples, channels),
        ACTIVATION_INDEX[act],
    )


def gradient_addresses(
    gradient: OutputGradient, samples: int, channels: int
) -> tuple[int, int, int, int, int, int, int, int, int]:
    grad, y, coefficients, gate, keep, offset, scale, shift, act = gradient
    return (
        map_address("grad", grad),
        map_address("y", y),
        address("coefficients", coefficients, 3, channels),
        address("gate", gate, samples, channels),
        address("keep", keep, samples),
        address("offset", offset, samples, channels),
        address("scale", scale, channels),
        address("shift", shift, channels),
        ACTIVATION_INDEX[act],
    )


def folded(prologue: Prologue) -> Prologue:
    """The prologue with running statistics, if any, as a scale and a shift, and both of them or neither."""
    scale, shift = fold_statistics(prologue)
    if scale is None and shift is not None:
        scale = torch.ones_like(shift)
    elif shift is None and scale is not None:
        shift = torch.zeros_like(scale)
    return Prologue(scale, shift, prologue.act, prologue.gate)
