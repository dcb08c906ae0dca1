"""How a launch plan launches: by the extension, all in one call, or one by one by Triton's launchers.

Triton's launcher takes a kernel's arguments from Python and calls the driver's ``cuLaunchKernelEx`` with their values
and with those of two parameters that the compiler adds: pointers to scratch memory, which our kernels do not use. The
extension does the same by ``cuLaunchKernel`` without Python. It does so on NVIDIA's GPUs, and only where each kernel's
PTX declares the parameters that this file expects.
"""

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from effnet_kernels.backends.cpu import extension

if TYPE_CHECKING:
    from effnet_kernels.backends.triton.launch import Handle, Launch

Run = Callable[[int, list[int]], None]
"""Launches on a stream, with the addresses to which parameters refer."""


class Parameter(NamedTuple):
    """An argument of a launch: ``value``, or with a ``base`` the address of that number plus ``value`` bytes."""

    value: Any
    base: int | None = None


class PlannedLaunch(NamedTuple):
    launch: "Launch"
    handle: "Handle"
    parameters: dict[str, Parameter]  # of all of the launch's arguments but constants


# Triton's types of parameters but pointers: the type in PTX, and how a value is packed into eight bytes.
_TYPES = {"i32": ("u32", "<i4x"), "i64": ("u64", "<q"), "fp32": ("f32", "<f4x")}
_POINTER = ("u64", "<Q")
_SCRATCH_TYPES = ["u64", "u64"]
_NO_SCRATCH = [(-1, 0), (-1, 0)]


def run_of(launches: Sequence[PlannedLaunch]) -> Run:
    """What makes these launches, in their order."""
    functions, native = driver_functions(), extension.load()[0]
    rows = None if functions is None or native is None else _native_launches(launches)
    if rows is None:
        return ByTriton(launches)
    handles = [handle for _, handle, _ in launches]
    return ByExtension(handles, native.Launches(functions, handles[0][0], rows))


class ByTriton:
    """Launches by the launchers of Triton's binaries."""

    def __init__(self, launches: Sequence[PlannedLaunch]) -> None:
        self._calls = [
            (handle, launch.grid, list(parameters.values()), list(launch.constants.values()))
            for launch, handle, parameters in launches
        ]

    def __call__(self, stream: int, addresses: list[int]) -> None:
        for (_, execute, binary, metadata, _), grid, parameters, constants in self._calls:
            arguments = [value if base is None else addresses[base] + value for value, base in parameters]
            execute(*grid, stream, binary, metadata, None, None, None, *arguments, *constants)


class ByExtension:
    """Launches by the extension's ``Launches``."""

    def __init__(self, handles: list["Handle"], native: Any) -> None:
        # Triton unloads a binary to whose handle nothing refers.
        self._handles = handles
        self._run = native.run

    def __call__(self, stream: int, addresses: list[int]) -> None:
        self._run(stream, addresses)


# Of CUDA's driver, in the order of csrc/gpu/launches.h.
_FUNCTIONS = ("cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain")


@functools.cache
def driver_functions() -> tuple[int, ...] | None:
    """The addresses of the driver's functions that the extension calls; None where there is no driver of CUDA's."""
    if torch.version.hip is not None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return tuple(ctypes.cast(getattr(driver, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS)
    except (OSError, AttributeError):
        return None


def _native_launches(launches: Sequence[PlannedLaunch]) -> list[tuple[Any, ...]] | None:
    """The launches as the extension takes them; None where Triton does more for one than pass its arguments."""
    rows = []
    for planned in launches:
        row = _native_launch(*planned)
        if row is None:
            return None
        rows.append(row)
    return rows


def _native_launch(launch: "Launch", handle: "Handle", parameters: dict[str, Parameter]) -> tuple[Any, ...] | None:
    _, _, function, _, compiled = handle
    metadata = compiled.metadata
    extras = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    # What a version of Triton does not say is not known to be absent.
    if getattr(metadata, "num_ctas", None) != 1 or any(getattr(metadata, name, True) for name in extras):
        return None
    declared, packed = [], []
    for name, type_ in compiled.src.signature.items():
        if type_ == "constexpr":
            continue
        declared_type, form = _POINTER if type_.startswith("*") else _TYPES.get(type_, ("", ""))
        if not form:
            return None
        declared.append(declared_type)
        packed.append(_packed(parameters[name], form))
    if _declared_types(compiled.asm.get("ptx", "")) != declared + _SCRATCH_TYPES:
        return None
    name, threads = launch.kernel.__name__, 32 * metadata.num_warps
    return name, function, launch.grid, threads, metadata.shared, packed + _NO_SCRATCH


def _packed(parameter: Parameter, form: str) -> tuple[int, int]:
    """The number of its base, or -1, and its value's bytes as an integer."""
    value, base = parameter
    (bits,) = struct.unpack("<Q", struct.pack(form, value))
    return -1 if base is None else base, bits


def _declared_types(ptx: str) -> list[str]:
    """Of the parameters of the kernel in a PTX file."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    return re.findall(r"\.param\s+\.(\w+)", entry.group(1)) if entry else []
