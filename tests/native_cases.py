"""What the tests of the native kernels share: the rows of the kernel table, how they run, guarded memory."""

import contextlib
import ctypes
import mmap
import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from effnet_kernels.backends import cpu
from effnet_kernels.backends.cpu.extension import extension

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


def kernel_isas(dtype: torch.dtype = torch.float32) -> list[str]:
    """Every instruction set with kernels of its own that this machine can run, those that only tests reach included."""
    if cpu.unavailable_reason() is not None:
        return []
    rows = [row for row in extension().kernels() if row["supported"]]
    return [row["isa"] for row in rows if (row["bf16"] if dtype == torch.bfloat16 else not row["shares_f32"])]


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


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether bfloat16 numbers are the same, zeros by their sign too, and NaN wherever the others are."""
    nan = x.isnan()
    return torch.equal(nan, y.isnan()) and torch.equal(x.view(torch.int16)[~nan], y.view(torch.int16)[~nan])
