"""Runs a program that is written for a GPU on a machine without one, to see that all of its code runs.

    python benchmarks/without_gpu.py FILE|-m MODULE [ARGUMENTS]

Nothing that it prints is a measurement. Tensors are the host's, and say that they are a GPU's; torch.cuda's clocks,
streams and graphs are stand-ins, of which a graph replays nothing. A launch does nothing, and what launches would
compute the reference computes, so that checks of numbers pass. Nothing is compiled, by Triton or by torch.compile, and
networks have two blocks. The environment variable ``EFFNET_WITHOUT_GPU`` says that all this is so.
"""

import contextlib
import functools
import os
import pickle
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction


class Event:
    """The host's clock in place of the GPU's."""

    def __init__(self, **options: bool) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        # Rates are divided by it.
        return max(1e3 * (end.at - self.at), 1e-6)

    def synchronize(self) -> None: ...


class Stream:
    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...


class CUDAGraph:
    def replay(self) -> None: ...


@contextlib.contextmanager
def in_context(*arguments: object, **options: object) -> Iterator[None]:
    """A stream's, a device's or a capture's context."""
    yield


def properties(device: object = None) -> SimpleNamespace:
    """An H100's."""
    return SimpleNamespace(name="none", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)


NOTHING = ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep")
CUDA: dict[str, Any] = {
    "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "current_stream": Stream,
    "stream": in_context, "graph": in_context, "device": in_context,
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: -1,
    "get_device_name": lambda device=None: "none", "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": properties, "is_current_stream_capturing": lambda: False,
    "memory_allocated": lambda: 0, "max_memory_allocated": lambda: 0,
    **{name: lambda *arguments: None for name in NOTHING},
}  # fmt: skip
HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)


class OnHost(TorchFunctionMode):
    """Makes on the host what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _host_for(value) for name, value in (kwargs or {}).items()}
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        return func(*map(_host_for, args), **kwargs) if name == "to" else func(*args, **kwargs)


def _host_for(argument: object) -> object:
    return HOST if isinstance(argument, str | torch.device) and str(argument).startswith("cuda") else argument


# The host's tensors say that they are on a GPU where a mode sends them to the host, and those without data do not.
REAL_DEVICE: Any = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


def device_of(tensor: Tensor) -> torch.device:
    real = REAL_DEVICE(tensor)
    return GPU if real.type == "cpu" and torch._C._len_torch_function_stack() else real


REAL_AUTOCAST = torch.autocast


@contextlib.contextmanager
def autocast_both(device: str, dtype: torch.dtype | None = None, **options: Any) -> Iterator[None]:
    """A GPU's autocast, which the package asks for, and the host's, by which torch computes here."""
    with REAL_AUTOCAST("cuda", dtype, **options), REAL_AUTOCAST("cpu", dtype, **options):
        yield


REAL_PROFILE = torch.profiler.profile


def profile_host(activities: object) -> torch.profiler.profile:
    return REAL_PROFILE(activities=[torch.profiler.ProfilerActivity.CPU])


REAL_RUN: Any = JITFunction.run


def launching_nothing() -> Callable[..., object]:
    """Takes the place of Triton's ``run``, in whose file it claims to be: by another a simulator would be known."""
    compiled = SimpleNamespace(run=lambda *arguments: None, function=0, packed_metadata=0)
    scope: dict[str, Any] = {"compiled": compiled}
    source = "def run(self, *args, grid, warmup, **kwargs): return compiled"
    exec(compile(source, REAL_RUN.__code__.co_filename, "exec"), scope)
    return scope["run"]


def computing(name: str) -> Callable[..., object]:
    """A primitive of the reference; while launches are captured, the one that makes them."""
    from effnet_kernels.backends.reference import primitives as reference
    from effnet_kernels.backends.triton import launch, primitives

    launching, computed = getattr(primitives, name), getattr(reference, name)

    def primitive(*arguments: Any, **options: Any) -> Any:
        if launch.is_capturing():
            return launching(*arguments, **options)
        with REAL_AUTOCAST("cpu", enabled=False):
            return computed(*arguments, **options)

    return primitive


def small_network(name: str, **options: object) -> torch.nn.Module:
    import gpu_cases

    return gpu_cases.network(name, toy=True)


def small_baseline(**options: object) -> torch.nn.Module:
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    return EfficientNet([MBConvConfig(1, 3, 2, 8, 8, 1), MBConvConfig(2, 5, 1, 8, 16, 1)], 0.0, num_classes=10)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    import torchvision

    import effnet_kernels
    from effnet_kernels.backends import triton
    from effnet_kernels.backends.base import Primitives
    from effnet_kernels.backends.triton import compilation, primitives
    from effnet_kernels.tools import timing

    names = [name for name in vars(Primitives) if not name.startswith("_")]
    with OnHost(), contextlib.ExitStack() as stack:
        for name, stand_in in CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for owner, name, stand_in in [
            (torch.version, "cuda", torch.version.cuda or "13.0"),
            (torch.Tensor, "device", property(device_of)),
            (torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
            (torch, "autocast", autocast_both),
            (torch.profiler, "profile", profile_host),
            (torch, "compile", lambda model, **options: model),
            (JITFunction, "run", launching_nothing()),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            (triton, "off_device", lambda: True),
            # What the compiling processes would be sent.
            (compilation, "compile_in_parallel", lambda binaries, *arguments: pickle.dumps(binaries) and None),
            (effnet_kernels, "create_model", small_network),
            (torchvision.models, "efficientnet_b0", small_baseline),
            # A host writes a GPU's cache and copies a GiB slowly.
            (timing, "_overwrite_cache", lambda: None),
            (timing, "copy_bandwidth", functools.partial(timing.copy_bandwidth, 1 << 16)),
            *((primitives, name, computing(name)) for name in names),
        ]:
            stack.enter_context(mock.patch.object(owner, name, stand_in, create=True))
        stack.enter_context(mock.patch.dict(os.environ, EFFNET_WITHOUT_GPU="1"))
        yield


def main() -> None:
    _, *arguments = sys.argv
    with without_gpu():
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
