"""What the tests of the native kernels share: the rows of the kernel table, an exact reference, guarded memory."""

import contextlib
import ctypes
import math
import mmap
import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import cpu
from effnet_kernels.cpu import depthwise
from effnet_kernels.cpu.extension import extension
from effnet_kernels.deferred import Activation, Epilogue, Padding, Prologue

needs_native = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks or maps guard pages: Linux only")
# The folder of the package whose extension is built with sanitizers, where scripts/sanitize runs the tests.
sanitized_folder = os.environ.get("EFFNET_KERNELS_SANITIZED")
pools_memory = pytest.mark.skipif(
    sanitized_folder is not None, reason="with sanitizers, freed memory is kept from use to see who touches it"
)


def kernel_isas() -> list[str]:
    """Every instruction set of the table that this machine can run, those that only tests reach included."""
    if cpu.unavailable_reason() is not None:
        return []
    return [row["isa"] for row in extension().kernels() if row["supported"]]


ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def expected_depthwise(x: Tensor, weight: Tensor, stride: int, padding: Padding, epilogue: Epilogue | None) -> Tensor:
    """The operator in float64 as torch has it."""
    y = F.conv2d(F.pad(x.double(), padding), weight.double(), stride=stride, groups=x.shape[1])
    if epilogue is None:
        return y
    if epilogue.scale is not None:
        y = y * epilogue.scale.double().view(-1, 1, 1)
    if epilogue.shift is not None:
        y = y + epilogue.shift.double().view(-1, 1, 1)
    return ACTIVATIONS[epilogue.act](y)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected).square().sum().item()
    return math.sqrt(difference / max(expected.square().sum().item(), 1e-60))


def native_depthwise(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue | None = None,
    isa: str | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """The primitive's output and its mean over the pixels, by one instruction set and so many threads."""
    with running(isa, threads):
        y, sums = depthwise.depthwise_conv(x, weight, stride, padding, Prologue(), epilogue or Epilogue(), "pool")
    assert sums is not None
    return y, sums.sum(dim=1) / max(1, y.shape[2] * y.shape[3])


@contextlib.contextmanager
def running(isa: str | None, threads: int) -> Iterator[None]:
    """So many threads, and one instruction set or the machine's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with contextlib.nullcontext() if isa is None else cpu.use_isa(isa):
            yield
    finally:
        torch.set_num_threads(before)


def make_epilogue(channels: int, act: Activation) -> Epilogue:
    return Epilogue(torch.rand(channels) + 0.5, torch.randn(channels), act)


def guarded(numel: int, at_end: bool) -> Tensor:
    """A vector that touches a page that nobody may touch, at its end or at its beginning. Its memory is never freed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    size = -(-numel * 4 // page) * page
    base = libc.mmap(
        None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    for forbidden in (base, base + page + size):
        assert libc.mprotect(forbidden, page, 0) == 0
    address = base + page + (size - numel * 4 if at_end else 0)
    return torch.frombuffer((ctypes.c_float * numel).from_address(address), dtype=torch.float32)
