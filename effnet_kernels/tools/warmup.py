"""Compiling a network's kernels before its first step."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select

if TYPE_CHECKING:
    from effnet_kernels.backends.triton.launch import Launch


def warmup(
    model: nn.Module,
    shape: Sequence[int],
    train: bool = True,
    dtype: torch.dtype | None = None,
    processes: int | None = None,
    smaller_batches: bool = True,
) -> int:
    """Compiles the Triton kernels of steps of ``model``, in parallel processes, into Triton's cache on disk.

    A first step compiles them one by one, which takes minutes; after this it finds them. Nothing is executed and
    nothing of the model changes: the steps' launches are captured on a copy without data.

    Args:
        model: a network on the GPU that it will run on; of a frozen one, inference alone (``train=False``).
        shape: the input's, [N, 3, H, W].
        train: forward and backward in train mode; otherwise inference in eval mode.
        dtype: the dtype of autocast (``torch.float16``, ``torch.bfloat16``); None for no autocast.
        processes: how many; None for as many as there are processors.
        smaller_batches: also compiles what batches of fewer images need, such as the last one of a data loader; for B0
            in training these are a third more kernels.

    Returns:
        The number of kernels compiled or found in the cache.

    Raises:
        BackendError: the kernels cannot run here.
        ValueError: the model is not on a GPU, or a shape that is not [N, C, H, W].
    """
    _check_shape(shape)
    # Configurations differ by the power of two above a batch.
    batches = [2**power for power in range((shape[0] - 1).bit_length())] if smaller_batches else []
    return compile_steps([Step(model, (batch, *shape[1:]), train, dtype) for batch in (shape[0], *batches)], processes)


class Step(NamedTuple):
    """A step of a network whose kernels are to be compiled: the arguments of :func:`warmup`."""

    model: nn.Module
    shape: Sequence[int]
    train: bool = True
    dtype: torch.dtype | None = None


def compile_steps(steps: Sequence[Step], processes: int | None = None) -> int:
    """Compiles the kernels of several steps on one GPU, all at once, and returns how many they are."""
    with select.use_backend("triton"):
        device = next(_tensors(steps[0].model)).device
        if device.type != "cuda":
            raise ValueError(f"expected a model on a GPU, got one on {device}")
        from effnet_kernels.backends.triton.compilation import compile_in_parallel, distinct, gpu_target
        from effnet_kernels.backends.triton.configs import device_target, use_target

        target = device_target(device)
        with use_target(target):
            binaries = distinct(launch for step in steps for launch in launches_of_step(*step))
        compile_in_parallel(binaries, gpu_target(target.architecture), processes)
    return len(binaries)


def launches_of_step(
    model: nn.Module, shape: Sequence[int], train: bool, dtype: torch.dtype | None = None
) -> "list[Launch]":
    """The launches that a step of ``model`` makes, in order, captured on a copy of it without data.

    Raises ValueError for a shape that is not [N, C, H, W].
    """
    from effnet_kernels.backends.triton.launch import capture_launches

    _check_shape(shape)
    hollow = without_data(model).train(train)
    own = next(t.dtype for t in _tensors(hollow) if t.is_floating_point())
    x = torch.empty(*shape, dtype=own, device="meta").contiguous(memory_format=torch.channels_last)
    if dtype is not None:
        # Autocast does not know the meta device, so that the layers whose weights it would cast are cast here.
        for module in hollow.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
    with capture_launches() as launches, torch.set_grad_enabled(train):
        with gpu_autocast(dtype):
            y = hollow(x)
        if train:
            outputs = [y] if isinstance(y, Tensor) else list(y)
            torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return launches


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 4:
        raise ValueError(f"shape: expected [N, C, H, W], got {tuple(shape)}")


@contextlib.contextmanager
def gpu_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast for GPUs, whether there is one or not; ``torch.autocast`` does nothing where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def without_data(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying the parameters first."""
    return copy.deepcopy(model, {id(t): _hollow(t) for t in _tensors(model)})


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; a frozen engine has the latter alone."""
    yield from model.parameters()
    yield from model.buffers()


def _hollow(t: Tensor) -> Tensor:
    hollow = torch.empty_like(t, device="meta")
    return nn.Parameter(hollow, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else hollow
