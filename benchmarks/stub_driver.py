"""A driver for Triton that compiles for an H100 and launches nothing, to time the host's part of a launch."""

import contextlib
import itertools
from collections.abc import Iterator
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


def _current_device() -> int:
    return -1  # where CPU tensors are


def _current_stream(device: int) -> int:
    return 0


def _is_capturing() -> bool:
    return False


@contextlib.contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Inside the ``with`` block launches go to the stub, and CPU tensors take the place of a GPU's."""
    from effnet_kernels.backends.triton import launch

    driver = StubDriver()
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.cuda, "current_device", _current_device),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", _is_capturing),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _current_stream, create=True),
        mock.patch.dict(launch._handles, clear=True),
    ):
        yield driver
