"""The one seam through which every Triton kernel is launched.

A launch is a kernel, a grid, its arguments and a configuration. What happens to it depends on where it is made. On a
GPU the compiled kernel is looked up and run. Inside :func:`capture_launches` it is added to a launch trace and nothing
runs, so that the bytes of a whole step can be counted, or its kernels compiled, on meta tensors of full size, without a
device.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from effnet_kernels.backends.scoped_value import ScopedValue

Argument = Tensor | int | float | bool | None
Grid = tuple[int, int, int]
Timer = Callable[[JITFunction, Callable[[], None]], None]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """A launch as it was asked for: an entry of a launch trace."""

    kernel: JITFunction
    grid: Grid
    arguments: dict[str, Argument]  # by the kernel's parameters, in their order
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    options: tuple[tuple[str, int], ...]  # the compiler's: num_warps, num_stages, maxnreg

    @property
    def num_warps(self) -> int:
        return dict(self.options)["num_warps"]


Options = tuple[int, int, int | None]
"""num_warps, num_stages and max_registers."""
Key = tuple[Any, ...]
Handle = tuple[int, Callable[..., None], Any, Any, Any]
"""The device of a compiled binary, how Triton runs it, its function and metadata, and Triton's own object, at whose end
the binary is unloaded."""


class Recording(list[Launch]):
    """A launch trace whose launches have run."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Key | None] = []

    def handles(self) -> list["Handle | None"]:
        """How each is run again; None where no binary is kept."""
        return [None if key is None else _handles.get(key) for key in self.keys]


_TRITONS_FILE = inspect.getfile(JITFunction)
_trace: ScopedValue[list[Launch]] = ScopedValue("launch_trace")
_timers: list[Timer] = []
# The names that a generated launcher uses itself.
_OWN_NAMES = {
    *("grid", "num_warps", "num_stages", "max_registers", "constants", "options", "key", "kernel", "function"),
    *("traces", "current_trace", "trace", "capture", "simulated", "timers", "handles", "handle", "run", "type"),
    *("x", "y", "z", "fits", "device", "execute", "binary", "metadata", "cuda", "bindings", "_"),
}
# A binary's key has all that tells it from others.
_handles: dict[Key, Handle] = {}


def launcher(kernel: JITFunction) -> Callable[..., None]:
    """Makes ``launch(grid, *, num_warps=4, num_stages=2, max_registers=None, **arguments)``, which launches ``kernel``.

    ``arguments`` are all of the kernel's parameters by name: pointers, whose names end in ``_ptr``, integers, which the
    kernel declares ``do_not_specialize``, floats, and ``tl.constexpr`` ones, which come last. A tensor that is absent
    is None, which the kernel sees at compile time. ``max_registers``, for each thread, keeps NVIDIA's assembler from
    spilling registers to raise the occupancy. The kernel runs on the device and current stream of its tensors.
    ``launch`` raises

        TypeError: a parameter that is missing, or an argument that the kernel does not have;
        ValueError: a grid over the device's limits, or tensors on different devices.

    ``launch`` is generated for each kernel, as Triton's own launchers are. Its signature names the kernel's
    parameters, so that Python orders the arguments, which is cheaper than a dictionary of keywords.
    """
    constants = [param.name for param in kernel.params if param.is_constexpr]
    parameters = kernel.arg_names[: len(kernel.arg_names) - len(constants)]
    if [*parameters, *constants] != kernel.arg_names:
        raise TypeError(f"{kernel.__name__}: expected tl.constexpr parameters behind all others")
    addresses = {name: name.removesuffix("_ptr") + "_address" for name in parameters if name.endswith("_ptr")}
    hidden = _OWN_NAMES.union(addresses.values()).intersection(kernel.arg_names)
    if hidden:
        raise TypeError(f"{kernel.__name__}: expected no parameter named {', '.join(sorted(hidden))}")
    tokens = [_token(name, name in kernel.do_not_specialize) for name in parameters]
    name = f"launch_{kernel.__name__}"
    listed = ", ".join(parameters), ", ".join(constants)
    source = f"""
def {name}(grid, *, {", ".join(kernel.arg_names)}, num_warps=4, num_stages=2, max_registers=None):
    {"; ".join(f"{address} = None if {ptr} is None else {ptr}.data_ptr()" for ptr, address in addresses.items())}
    constants, options = ({listed[1]},), (num_warps, num_stages, max_registers)
    key = None if simulated() else (function, options, constants, {", ".join(tokens)})
    if traces and (trace := current_trace()) is not None:
        return capture(trace, key, kernel, grid, ({listed[0]},), constants, options)
    if timers:
        return timers[-1](kernel, lambda: run(key, kernel, grid, ({listed[0]},), constants, options))
    handle = handles.get(key)
    x, y, z = grid
    fits = 0 < x <= {_GRID_LIMITS[0]} and 0 < y <= {_GRID_LIMITS[1]} and 0 < z <= {_GRID_LIMITS[2]}
    if handle is None or not fits or handle[0] != cuda.current_device():
        return run(key, kernel, grid, ({listed[0]},), constants, options)
    device, execute, binary, metadata, _ = handle
    # Triton would turn each tensor into its address itself, and ask the driver about it.
    execute(
        x, y, z, bindings._cuda_getCurrentRawStream(device), binary, metadata, None, None, None,
        {", ".join(addresses.get(name, name) for name in kernel.arg_names)},
    )
"""
    scope: dict[str, Any] = {
        "kernel": kernel,
        # Hashing the kernel itself computes its cache key.
        "function": kernel.fn,
        "traces": _trace.open_blocks,
        "current_trace": _trace.get,
        "capture": _capture,
        "simulated": simulated,
        "timers": _timers,
        "handles": _handles,
        "run": _run,
        "cuda": torch.cuda,
        "bindings": torch._C,
    }
    exec(compile(source, f"<launcher of {kernel.__name__}>", "exec"), scope)
    return cast(Callable[..., None], scope[name])


def _token(name: str, is_integer: bool) -> str:
    """The part of a binary's key that comes from one parameter, as an expression."""
    if name.endswith("_ptr"):
        address = name.removesuffix("_ptr") + "_address"
        return f"None if {name} is None else ({name}.dtype, {name}.get_device(), {address} & 15 == 0)"
    # Triton compiles an integer of 64 bits separately, but not each value of an integer.
    return f"{name}.bit_length() < 32" if is_integer else f"type({name})"


def _named(options: Options) -> tuple[tuple[str, int], ...]:
    """The options by the compiler's names."""
    num_warps, num_stages, max_registers = options
    named = (("num_warps", num_warps), ("num_stages", num_stages))
    return named if max_registers is None else (*named, ("maxnreg", max_registers))


def _is_empty(kernel: JITFunction, grid: Grid) -> bool:
    """Whether a grid has no programs; raises ValueError for one over the limits."""
    if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
        raise ValueError(f"{kernel.__name__}: expected a grid within {_GRID_LIMITS}, got {grid}")
    return 0 in grid


def _capture(
    trace: list[Launch],
    key: Key | None,
    kernel: JITFunction,
    grid: Grid,
    parameters: tuple[Argument, ...],
    constants: tuple[Any, ...],
    options: Options,
) -> None:
    """Adds a launch to the trace that is being captured, and runs it where it is only recorded."""
    if _is_empty(kernel, grid):
        return
    # Detached, because autograd copies a gradient that it hands over while another tensor refers to it.
    detached = [a.detach() if isinstance(a, Tensor) else a for a in parameters]
    arguments = dict(zip(kernel.arg_names, detached, strict=False))
    by_name = dict(zip(kernel.arg_names[len(detached) :], constants, strict=True))
    trace.append(Launch(kernel, grid, arguments, by_name, _named(options)))
    if isinstance(trace, Recording):
        trace.keys.append(key)
        _run(key, kernel, grid, parameters, constants, options)


def _run(
    key: Key | None,
    kernel: JITFunction,
    grid: Grid,
    parameters: tuple[Argument, ...],
    constants: tuple[Any, ...],
    options: Options,
) -> None:
    """Runs the binary of a key, compiled if it is new. A launch without a key goes to Triton, or to its simulator.

    Launchers do the same themselves where there is nothing to compile, to check or to switch.
    """
    x, y, z = grid
    limit_x, limit_y, limit_z = _GRID_LIMITS
    if not (0 < x <= limit_x and 0 < y <= limit_y and 0 < z <= limit_z) and _is_empty(kernel, grid):
        return
    handle = None if key is None else _handles.get(key)
    if handle is None:
        _run_first(key, kernel, grid, parameters, constants, options)
        return
    device, run, function, metadata, _ = handle
    arguments = (function, metadata, None, None, None, *parameters, *constants)
    if device == torch.cuda.current_device():
        run(x, y, z, torch._C._cuda_getCurrentRawStream(device), *arguments)
    else:
        with torch.cuda.device(device):
            run(x, y, z, torch._C._cuda_getCurrentRawStream(device), *arguments)


def _run_first(
    key: Key | None,
    kernel: JITFunction,
    grid: Grid,
    parameters: tuple[Argument, ...],
    constants: tuple[Any, ...],
    options: Options,
) -> None:
    """Launches through Triton, which compiles the kernel, and keeps a handle of the binary."""
    for name, argument in zip(kernel.arg_names, parameters, strict=False):
        if type(argument) is int and name not in kernel.do_not_specialize:
            # Triton compiles such an integer separately for some values, which the key does not tell apart.
            raise TypeError(f"{kernel.__name__}: expected the integer {name} among those that are do_not_specialize")
    if key is None:
        kernel[grid](*parameters, *constants, **dict(_named(options)))
        return
    devices = sorted({argument.get_device() for argument in parameters if isinstance(argument, Tensor)})
    if len(devices) != 1:
        names = ", ".join(f"cuda:{index}" if index >= 0 else "the CPU" for index in devices)
        raise ValueError(f"{kernel.__name__}: expected tensors on one device, got {names}")
    (device,) = devices
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__}: expected a first launch before a CUDA graph is captured, because it compiles and "
            "loads the kernel; run the same step once before the capture"
        )
    with contextlib.nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
        compiled = kernel[grid](*parameters, *constants, **dict(_named(options)))
    _handles[key] = (device, compiled.run, compiled.function, compiled.packed_metadata, compiled)


@contextlib.contextmanager
def capture_launches() -> Iterator[list[Launch]]:
    """The launch trace of the ``with`` block: its launches in order, none of which runs.

    Launches of other threads run as ever.
    """
    trace: list[Launch] = []
    with _trace.bound_to(trace):
        yield trace


@contextlib.contextmanager
def timed_by(timer: Timer) -> Iterator[None]:
    """Inside the ``with`` block ``timer`` is called for each launch, with the kernel and a function that runs it.

    It is called for launches of all threads.
    """
    _timers.append(timer)
    try:
        yield
    finally:
        _timers.pop()


@contextlib.contextmanager
def record_launches() -> Iterator[Recording]:
    """The launches of this thread in the ``with`` block, which run as ever."""
    recording = Recording()
    with _trace.bound_to(recording):
        yield recording


def is_capturing() -> bool:
    """Whether this thread captures a launch trace."""
    trace = _trace.get()
    return trace is not None and not isinstance(trace, Recording)


def runs_plainly() -> bool:
    """Whether launches of this thread run on a GPU, and nobody captures, records or times them."""
    return _trace.get() is None and not _timers and not simulated()


def simulated() -> bool:
    """Whether launches are executed by a simulator, on tensors in the host's memory, instead of by a GPU."""
    return JITFunction.run.__code__.co_filename != _TRITONS_FILE


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for inputs of ``dtype``: torch's TF32 setting for convolutions, for fp32."""
    if dtype != torch.float32:
        return "ieee"
    # The newer of torch's two settings, which follows the older. Reading the older raises once the newer has been set.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


def channel_divisor(channels: int, divisors: tuple[int, ...] = (8,)) -> int:
    """The first of ``divisors`` that divides ``channels``, for which kernels are compiled, or 1.

    By it the compiler sees how wide an access can be: by 8 that rows of maps in 16 bits begin at 16 bytes.
    """
    return next((divisor for divisor in divisors if channels % divisor == 0), 1)
