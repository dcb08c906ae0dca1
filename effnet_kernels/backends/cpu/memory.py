"""Tensors for the native kernels to write, the addresses that they take, and how they run.

Large maps come from a pool that keeps the memory of earlier ones: see ``csrc/platform/pool.h``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from effnet_kernels.backends.batch_norm import scale_and_shift
from effnet_kernels.backends.cpu.extension import extension, has_bf16, isa, unavailable_reason
from effnet_kernels.backends.scoped_value import ScopedValue
from effnet_kernels.fusion.spec import ACTIVATIONS, OutputGradient, Prologue

ACTIVATION_INDEX = {act: index for index, act in enumerate(ACTIVATIONS)}
# The system's allocator keeps smaller blocks than this itself.
_POOLED_BYTES = 128 * 1024
_FLOAT, _CHANNELS_LAST = torch.float32, torch.channels_last

_isa: ScopedValue[str] = ScopedValue("isa")


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """The kernels of one instruction set for the calls inside the ``with`` block, those that only tests reach included.

    Calls raise ValueError for a name that is not in the table of kernels or that this machine does not support.
    """
    with _isa.bound_to(name):
        yield


def execution() -> tuple[int, str | None]:
    """How many threads a call may use, and the instruction set where one is forced."""
    return torch.get_num_threads(), _isa.get()


def runs_bf16() -> bool:
    """Whether the extension is there, and the instruction set in use has kernels for networks in bfloat16."""
    return unavailable_reason() is None and has_bf16(_isa.get() or isa())


def check_bf16() -> None:
    """Raises ValueError where the instruction set in use has no kernels for networks in bfloat16."""
    if not runs_bf16():
        raise ValueError(extension().without_bf16(_isa.get() or isa()))


def empty(*shape: int) -> Tensor:
    """float32 on the CPU, contiguous, not initialised."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def empty_map(samples: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, C, H, W] in channels-last strides, on the CPU, not initialised; the kernels' maps are float32."""
    shape = samples, channels, height, width
    strides = channels * height * width, 1, width * channels, channels
    bytes_needed = dtype.itemsize * samples * channels * height * width
    if bytes_needed < _POOLED_BYTES:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    pooled = torch.frombuffer(extension().PooledBytes(bytes_needed), dtype=dtype)
    # A tensor of its own: autograd forbids in-place operations on a view that a custom Function returns.
    return torch.empty(0, dtype=dtype, device="cpu").set_(pooled.untyped_storage(), 0, shape, strides)


def cast_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A map [N, C, H, W], on the CPU, in another dtype and in channels-last strides; itself where it has that dtype.

    It is without autograd. Its memory comes from the pool: the system would clear that of a fresh tensor, which takes
    longer than the cast.
    """
    if x.dtype is dtype:
        return x
    samples, channels, height, width = x.shape
    return empty_map(samples, channels, height, width, dtype).copy_(x)


def release_memory() -> None:
    """Gives the system back the memory that is kept for maps, and that of packed weights of models in eval mode.

    A frozen engine keeps its weights. A model packs its own again at its next call without gradients.
    """
    for cache in list(_released):
        cache.forget()
    extension().release_memory()


class Releasable(Protocol):
    """An object that keeps memory which it can make again."""

    def forget(self) -> None:
        """Frees the memory."""


def released_with_memory(cache: Releasable) -> None:
    """From now on :func:`release_memory` calls the object's ``forget()``. The object is not kept alive."""
    _released.add(cache)


_released: WeakSet[Releasable] = WeakSet()


def address(name: str, tensor: Tensor | None, *shape: int, dtype: torch.dtype = _FLOAT) -> int:
    """The address of an operand of this shape, contiguous, for the extension; 0 for None.

    The kernels read and write raw memory: every operand's address comes from here, from :func:`map_address` or from
    :func:`strided_address`, and the address of a result from :func:`written`.

    Raises ValueError where the tensor is not memory on the CPU, of this dtype and shape and in these strides. Maps
    alone are checked for lazy negation: a caller of a primitive has brought parameters and vectors to memory.
    """
    if tensor is None:
        return 0
    memory = tensor.data_ptr()
    if tensor.shape == shape and tensor.dtype is dtype and tensor.is_cpu and memory and tensor.is_contiguous():
        return memory
    return _refused(name, tensor, shape, tensor.is_contiguous(), "contiguous", dtype)


def map_address(name: str, x: Tensor | None, samples: int, channels: int, height: int, width: int) -> int:
    """The address of a map [N, C, H, W] in channels-last strides, 0 for None; see :func:`address`."""
    if x is None:
        return 0
    memory, shape = x.data_ptr(), (samples, channels, height, width)
    fits = x.shape == shape and x.dtype is _FLOAT and x.is_cpu and memory and not x.is_neg()
    if fits and x.is_contiguous(memory_format=_CHANNELS_LAST):
        return memory
    dense = x.dim() == 4 and x.is_contiguous(memory_format=_CHANNELS_LAST)
    return _refused(name, x, shape, dense, "in channels-last strides")


def strided_address(name: str, tensor: Tensor, *shape: int, dtype: torch.dtype = _FLOAT) -> tuple[int, ...]:
    """The address of an operand in any strides, and the strides, in elements; see :func:`address`."""
    memory = tensor.data_ptr()
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu or not memory or tensor.is_neg():
        _refused(name, tensor, shape, True, "in any strides", dtype)
    return memory, *tensor.stride()


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A 64-bit hash of the values of dense tensors on the CPU."""
    threads, isa = execution()
    return extension().fingerprint([(t.data_ptr(), t.nbytes) for t in tensors], threads, isa)


def written(tensor: Tensor | None) -> int:
    """The address of a tensor that :func:`empty` or :func:`empty_map` has made for the call, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _refused(
    name: str, tensor: Tensor, shape: tuple[int, ...], is_dense: bool, layout: str, dtype: torch.dtype = _FLOAT
) -> int:
    """Raises ValueError with what is wrong with an operand; the address of one without elements is 0."""
    if tensor.shape != shape or not is_dense:
        raise ValueError(
            f"{name}: expected shape {shape}, {layout}, got {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if tensor.dtype is not dtype or not tensor.is_cpu:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected a {expected} tensor on the CPU, got {tensor.dtype} on {tensor.device}")
    if tensor.numel() > 0:
        raise ValueError(f"{name}: expected a tensor whose values are in memory, got one that is lazy or was freed")
    return 0


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
    gradient: OutputGradient, samples: int, channels: int, height: int, width: int
) -> tuple[int, int, int, int, int, int, int, int, int]:
    """The addresses of an :class:`OutputGradient` of a map of this shape, and its activation's index."""
    grad, y, coefficients, gate, drop_path_scale, offset, scale, shift, act = gradient
    if (scale is None) != (shift is None):
        raise ValueError("gradient: expected scale and shift together")
    if y is None and (act != "none" or coefficients is not None):
        raise ValueError("gradient: expected y beside an activation or coefficients")
    return (
        map_address("grad", grad, samples, channels, height, width),
        map_address("y", y, samples, channels, height, width),
        address("coefficients", coefficients, 3, channels),
        address("gate", gate, samples, channels),
        address("drop_path_scale", drop_path_scale, samples),
        address("offset", offset, samples, channels),
        address("scale", scale, channels),
        address("shift", shift, channels),
        ACTIVATION_INDEX[act],
    )


Affine = TypeVar("Affine", Prologue, OutputGradient)


def with_both(affine: Affine) -> Affine:
    """The operand with both a scale and a shift where it has one of them."""
    scale, shift = affine.scale, affine.shift
    if scale is not None and shift is None:
        return affine._replace(shift=torch.zeros_like(scale))
    if shift is not None and scale is None:
        return affine._replace(scale=torch.ones_like(shift))
    return affine


def folded(prologue: Prologue) -> Prologue:
    """The prologue with running statistics, if any, as a scale and a shift, and both of them or neither."""
    if prologue.statistics is None:
        return with_both(prologue)
    mean, var, eps = prologue.statistics
    scale, shift = scale_and_shift(mean, torch.rsqrt(var + eps), prologue.scale, prologue.shift)
    return with_both(Prologue(scale, shift, prologue.act, prologue.gate))
