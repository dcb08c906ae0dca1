"""The binaries of a launch trace, compiled ahead of time, for the GPU of this machine or for any other."""

import collections
import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from effnet_kernels.backends.triton.launch import Launch

# A kernel that is in Triton's cache takes a few hundredths of this, one that is not several times as long.
_SECONDS_FROM_CACHE = 0.05
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


class Binary(NamedTuple):
    """All that decides a compilation: launches that agree in it share a binary."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        kernel = self.kernel.fn
        return _restored, (kernel.__module__, kernel.__name__, *self[1:])

    def __str__(self) -> str:
        given = " ".join(f"{name}={value}" for name, value in self.constants if value is not None)
        absent = " ".join(name.removesuffix("_ptr") for name, value in self.constants if value is None)
        dtypes = sorted({kind[1:] for _, kind in self.signature if kind.startswith("*")})
        without = f" without {absent}" if absent else ""
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.kernel.__name__} {'/'.join(dtypes)} {given}{without} {options}"


def binary_of(launch: Launch) -> Binary:
    """The binary of a launch whose tensors are aligned to 16 bytes, as torch's allocators make them."""
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    for name, argument in launch.arguments.items():
        if argument is None:
            signature.append((name, "constexpr"))
            constants.append((name, None))
        elif isinstance(argument, Tensor):
            signature.append((name, _TYPES[argument.dtype]))
        elif isinstance(argument, int):
            signature.append((name, "i32" if -(2**31) <= argument < 2**31 else "i64"))
        else:
            signature.append((name, "fp32"))
    signature += [(name, "constexpr") for name in launch.constants]
    constants += launch.constants.items()
    order = {name: index for index, name in enumerate(launch.kernel.arg_names)}
    return Binary(
        launch.kernel,
        tuple(sorted(signature, key=lambda entry: order[entry[0]])),
        tuple(sorted(constants, key=lambda entry: order[entry[0]])),
        launch.options,
    )


def distinct(launches: Iterable[Launch]) -> list[Binary]:
    """The binaries that the launches need, in order of first use."""
    return list(dict.fromkeys(binary_of(launch) for launch in launches))


def gpu_target(architecture: int | str) -> GPUTarget:
    """Triton's target of a compute capability (90) or an AMD architecture ("gfx942")."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


class _TargetDriver:
    """The part of a driver that Triton uses when it compiles: the target GPU, which need not be in this machine."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device, for which any value will do.
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_for(binary: Binary, target: GPUTarget) -> Any:
    """Triton's compiled kernel for a target, from its cache if it is there, compiled as a launch compiles it."""
    constants = dict(binary.constants)
    examples: dict[str, Any] = {"i32": 2, "i64": 2**40, "fp32": 0.5, **{name: dtype for dtype, name in _TYPES.items()}}
    arguments = [constants[name] if kind == "constexpr" else examples[kind] for name, kind in binary.signature]
    config = triton.runtime.driver
    active, config._active = config._active, _TargetDriver(target)
    try:
        return binary.kernel.warmup(*arguments, grid=(1,), **dict(binary.options))
    finally:
        config._active = active


def compile_in_parallel(binaries: Sequence[Binary], target: GPUTarget, processes: int | None = None) -> None:
    """Fills Triton's cache with the binaries, where later launches find them.

    Raises RuntimeError, after all that compile are there, naming those that do not.
    """
    # The slowest first, because one that is begun last would keep a single process busy: depthwise convolutions, whose
    # K x K products are unrolled.
    pending = collections.deque(sorted(binaries, key=lambda binary: dict(binary.constants).get("K", 0), reverse=True))
    errors = _compile_while_cached(pending, target)
    count = min(len(pending), processes or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(count, 1)) as pool:
        workers = [pool.submit(_compile_in_process, pending, target) for _ in range(count)]
        errors += [error for worker in workers for error in worker.result()]
    if errors:
        failed = "; ".join(errors)
        raise RuntimeError(f"expected {len(binaries)} kernels to compile, but {len(errors)} failed: {failed}")


def _compile_while_cached(pending: "collections.deque[Binary]", target: GPUTarget) -> list[str]:
    """Compiles in this process, the fastest first, until two have taken so long that they were not in the cache.

    One may take long to begin with, because Triton reads its own code for the keys of the cache.
    """
    errors: list[str] = []
    slow = 0
    while pending and slow < 2:
        start = time.perf_counter()
        binary = pending.pop()
        error = _error_of(binary, target)
        if error is not None:
            errors.append(f"{binary}: {error}")
        slow += time.perf_counter() - start > _SECONDS_FROM_CACHE
    return errors


def _error_of(binary: Binary, target: GPUTarget) -> str | None:
    """Compiles a binary, or says what went wrong."""
    try:
        compiled = compile_for(binary, target)
        if torch.cuda.is_available():
            # Up to 3.6 Triton also compiles a launcher in C for each signature, and keeps it in the same cache.
            triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def _compile_in_process(pending: "collections.deque[Binary]", target: GPUTarget) -> list[str]:
    """Lets one other process compile binaries for as long as any are pending; what went wrong."""
    # An interpreter of its own, because multiprocessing would import the caller's script again.
    command = [sys.executable, "-c", "from effnet_kernels.backends.triton.compilation import work; work()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    errors = []
    with (
        # What a process that has died was not sent.
        contextlib.suppress(BrokenPipeError),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        while True:
            try:
                binary = pending.popleft()
            except IndexError:
                break
            try:
                pickle.dump((binary, tuple(target.__dict__.values())), worker.stdin)
                worker.stdin.flush()
                error = pickle.load(worker.stdout)
            except (EOFError, OSError):
                errors.append(f"{binary}: its process ended with status {worker.wait()}")
                break
            if error is not None:
                errors.append(f"{binary}: {error}")
    return errors


def work() -> None:
    """The work of a process of :func:`compile_in_parallel`: compiles each binary that it receives, and says how."""
    # Whatever prints goes to stderr, so that the answers are alone.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            binary, target = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_error_of(binary, GPUTarget(*target)), answers)
        answers.flush()


def _restored(module: str, name: str, *fields: Any) -> Binary:
    """A binary that has been pickled, with its kernel found by name."""
    return Binary(getattr(importlib.import_module(module), name), *fields)
