"""Timing of work on a GPU: contenders in turn, CUDA events, a cold cache, medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def interleaved(contenders: Mapping[str, Call], rounds: int, warm: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each round of each contender, after ``warm`` rounds that do not count.

    In every round each contender is asked once, so that what disturbs one disturbs all. Before each measurement the
    GPU's cache is overwritten.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warm + rounds):
        for name, call in contenders.items():
            milliseconds = measure(call)
            if index >= warm:
                times[name].append(milliseconds)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def measure(call: Call) -> float:
    """Milliseconds of one call, by the GPU's clock; by the host's where launches are simulated."""
    if not _has_gpu():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    _overwrite_cache()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = medians(interleaved({"copy": lambda: target.copy_(source)}, rounds=10))["copy"]
    return 2 * size / (milliseconds / 1e3)


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.cuda is not None and not _simulated()


def _simulated() -> bool:
    from effnet_kernels.backends.triton.launch import simulated

    return simulated()


_scratch: dict[int, torch.Tensor] = {}


def _overwrite_cache() -> None:
    """Twice what the largest L2 caches hold, so that nothing of a contender's input is left there."""
    device = torch.cuda.current_device()
    if device not in _scratch:
        _scratch[device] = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    _scratch[device].zero_()
