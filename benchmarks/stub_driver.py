"""Drivers for Triton that compile for an H100 and launch nothing, to time the host's part of a launch."""

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget


class StubDriver:
    """The methods of a driver that Triton calls when it compiles and launches a kernel."""

    _devices = itertools.count()

    def __init__(self) -> None:
        # Triton keeps compiled kernels by device, and those of another stub launch there.
        self.device = next(self._devices)
        self.launched: list[tuple[Any, ...]] = []  # the arguments of each launch
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return lambda *arguments: self.launched.append(arguments)


class NullDriver(StubDriver):
    """Triton's own launchers, which call a libcuda.so.1 that does nothing.

    There can be one in a process, and it has to be made before anything loads a real one. Needs a C compiler, ``$CC``
    or cc, as these launchers do.
    """

    def __init__(self, folder: Path) -> None:
        """Compiles the library into ``folder``."""
        super().__init__()
        path = folder / "libcuda.so.1"
        source = Path(__file__).with_name("null_driver.c")
        compiler = os.environ.get("CC", "cc")
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{path.name}"]
        subprocess.run([compiler, *flags, source, "-o", path], check=True)
        # Triton's launchers before 3.6 are linked with it.
        (folder / "libcuda.so").symlink_to(path.name)
        # Whoever loads a library of this name from now on gets this one.
        self.libcuda = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(folder)):
            from triton.backends.nvidia import driver

            self.utils = driver.CudaUtils()
        self.folder, self.launcher = folder, driver.CudaLauncher

    def launcher_cls(self, source: object, metadata: object) -> Any:
        # Some versions compile a launcher for each kernel.
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(self.folder)):
            return self.launcher(source, metadata)


def _current_device() -> int:
    return -1  # where CPU tensors are


def _current_stream(device: int) -> int:
    return 0


def _is_capturing() -> bool:
    return False


def _no_driver_functions() -> None:
    return None


def _true(*arguments: object) -> bool:
    return True


@contextlib.contextmanager
def stub_driver(driver: StubDriver | None = None) -> Iterator[StubDriver]:
    """Inside the ``with`` block launches go to ``driver``, a new stub by default, and CPU tensors take the place of a
    GPU's. Plans launch by Triton's launchers, but with a :class:`NullDriver`.
    """
    from effnet_kernels.backends.triton import launch, plan_launches

    function = plan_launches.driver_functions if isinstance(driver, NullDriver) else _no_driver_functions
    driver = driver or StubDriver()
    with (
        mock.patch.object(plan_launches, "driver_functions", function),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.cuda, "current_device", _current_device),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", _is_capturing),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _current_stream, create=True),
        mock.patch.dict(launch._handles, clear=True),
    ):
        yield driver


@contextlib.contextmanager
def models_on(driver: StubDriver | None = None) -> Iterator[StubDriver]:
    """:func:`stub_driver`, in which modules run as on a GPU. Their outputs are whatever the memory held before."""
    from effnet_kernels.backends import select, triton

    with (
        mock.patch.object(triton, "off_device", _true),
        mock.patch.object(select.Call, "on_gpu", _true),
        stub_driver(driver) as given,
        select.use_backend("triton"),
    ):
        yield given
