"""The one seam through which every Triton kernel is launched.

A launch is a kernel, a grid, its arguments and a configuration. What happens with it depends on where it is made: on a
GPU the compiled kernel is looked up and run; inside :func:`recording` it is noted and nothing runs, so that a whole
step can be counted or compiled on meta tensors, at full size, without a device.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

Argument = Tensor | int | float | bool | None
Grid = tuple[int, int, int]
Timer = Callable[[JITFunction, Callable[[], None]], None]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """What a launch was asked to do."""

    kernel: JITFunction
    grid: Grid
    arguments: dict[str, Argument]  # by the kernel's parameters, in their order
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    options: tuple[tuple[str, int], ...]  # the compiler's: num_warps, num_stages, maxnreg

    @property
    def num_warps(self) -> int:
        return dict(self.options)["num_warps"]


_TRITONS_FILE = inspect.getfile(JITFunction)
_recorders: list[list[Launch]] = []
_timers: list[Timer] = []
_handles: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: JITFunction,
    grid: Grid,
    *arguments: Argument,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Launches ``kernel`` over ``grid`` on the device and current stream of its tensors.

    ``arguments`` are the kernel's parameters in order, ``constants`` its ``tl.constexpr`` parameters by name, which
    come last. A tensor that is absent is None, which the kernel sees at compile time. ``max_registers`` a thread keep
    NVIDIA's assembler from spilling for the sake of occupancy.

    Raises:
        ValueError: a grid over the device's limits, or tensors on different devices.
    """
    x, y, z = grid
    if y > _GRID_LIMITS[1] or z > _GRID_LIMITS[2] or x > _GRID_LIMITS[0]:
        raise ValueError(f"{kernel.__name__}: expected a grid within {_GRID_LIMITS}, got {grid}")
    if x == 0 or y == 0 or z == 0:
        return
    options: tuple[tuple[str, int], ...] = (("num_warps", num_warps), ("num_stages", num_stages))
    if max_registers is not None:
        options += (("maxnreg", max_registers),)
    if _recorders:
        # Detached, so that the record does not make autograd copy gradients that somebody else seems to hold.
        noted = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        named = dict(zip(kernel.arg_names[: len(noted)], noted, strict=True))
        _recorders[-1].append(Launch(kernel, grid, named, constants, options))
        return
    if _timers:
        _timers[-1](kernel, lambda: _execute(kernel, grid, arguments, constants, options))
    else:
        _execute(kernel, grid, arguments, constants, options)


def _execute(
    kernel: JITFunction,
    grid: Grid,
    arguments: tuple[Argument, ...],
    constants: dict[str, Any],
    options: tuple[tuple[str, int], ...],
) -> None:
    if simulated():
        kernel[grid](*arguments, **constants, **dict(options))
        return
    # What tells two binaries apart. Integers are declared do_not_specialize, so that only their width does.
    key: list[Any] = [kernel, options, *constants.values()]
    device = -1
    for argument in arguments:
        if argument is None:
            key.append(None)
        elif type(argument) is int:
            key.append(argument.bit_length() < 32)
        elif isinstance(argument, Tensor):
            device = argument.get_device()
            key += (device, argument.dtype, argument.data_ptr() & 15 == 0)
        else:
            key.append(float)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(tuple(key), kernel, grid, arguments, constants, options, device)
    else:
        _run(tuple(key), kernel, grid, arguments, constants, options, device)


def _run(
    key: tuple[Any, ...],
    kernel: JITFunction,
    grid: Grid,
    arguments: tuple[Argument, ...],
    constants: dict[str, Any],
    options: tuple[tuple[str, int], ...],
    device: int,
) -> None:
    handle = _handles.get(key)
    if handle is None:
        devices = sorted({argument.get_device() for argument in arguments if isinstance(argument, Tensor)})
        if len(devices) > 1:
            names = ", ".join(f"cuda:{index}" if index >= 0 else "the CPU" for index in devices)
            raise ValueError(f"{kernel.__name__}: expected tensors on one device, got {names}")
        compiled = kernel[grid](*arguments, **constants, **dict(options))
        ordered = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _handles[key] = (compiled.run, compiled.function, compiled.packed_metadata, ordered)
        return
    run, function, metadata, ordered = handle
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(*grid, stream, function, metadata, None, None, None, *arguments, *ordered)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Notes the launches made inside the ``with`` block, in order, instead of running them."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


@contextlib.contextmanager
def timed_by(timer: Timer) -> Iterator[None]:
    """Inside the ``with`` block ``timer`` gets each launch's kernel and the launch, which it makes."""
    _timers.append(timer)
    try:
        yield
    finally:
        _timers.pop()


def is_recording() -> bool:
    return bool(_recorders)


def simulated() -> bool:
    """Whether launches are executed by a simulator, on tensors in the host's memory, instead of by a GPU."""
    return JITFunction.run.__code__.co_filename != _TRITONS_FILE


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for inputs of ``dtype``: torch's TF32 setting for convolutions, for fp32."""
    # The newer of torch's two settings follows the older; the older is an error to ask for once the newer was set.
    if dtype != torch.float32:
        return "ieee"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


def channel_unit(channels: int) -> int:
    """The multiple that a kernel may take the channels for: 8, so that the compiler sees 16-byte accesses, or 1."""
    return 8 if channels % 8 == 0 else 1
