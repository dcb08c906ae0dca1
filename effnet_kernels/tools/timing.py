"""Timing of work on a GPU: contenders in turn, CUDA events, a cold cache, medians; and single launches of a trace."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effnet_kernels.backends.triton.launch import Argument, Launch

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


def host_milliseconds(call: Call, rounds: int = 5) -> float:
    """The host's median time to issue a call to an idle GPU; shorter than the GPU's where the host keeps ahead."""
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    synchronize()
    return statistics.median(times)


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, which writes its gradients and outputs to the memory of its capture.

    The graph reads the memory of what the call refers to, such as parameters, so that the call is kept with the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return functools.partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, captured: Call) -> None:
    graph.replay()


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = medians(interleaved({"copy": lambda: target.copy_(source)}, rounds=10))["copy"]
    return 2 * size / (milliseconds / 1e3)


def distinct_launches(launches: "Iterable[Launch]") -> "list[tuple[Launch, int]]":
    """The launches that differ in more than their data, in order of first use, and how often each is made."""
    counts: dict[object, int] = {}
    first: dict[object, Launch] = {}
    for launch in launches:
        arguments = tuple(map(_layout, launch.arguments.values()))
        key = launch.kernel.__name__, launch.grid, arguments, tuple(launch.constants.items()), launch.options
        first.setdefault(key, launch)
        counts[key] = counts.get(key, 0) + 1
    return [(launch, counts[key]) for key, launch in first.items()]


def replay(launch: "Launch") -> Call:
    """A captured launch on random data: tensors of its shapes, strides and dtypes on the current GPU."""
    from effnet_kernels.backends.triton.launch import launcher

    options = dict(launch.options)
    arguments: dict[str, Any] = {name: _random(argument) for name, argument in launch.arguments.items()}
    arguments |= launch.constants
    return functools.partial(
        launcher(launch.kernel),
        launch.grid,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        max_registers=options.get("maxnreg"),
        **arguments,
    )


def _layout(argument: "Argument") -> object:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return argument


def _random(argument: "Argument") -> "Argument":
    """Normal values in maps and matrices, positive ones in vectors, among which are variances; zero for integers."""
    if not isinstance(argument, Tensor):
        return argument
    # An expanded tensor is smaller than its shape.
    size = 1 + sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True))
    values = torch.zeros(max(size, 1), dtype=argument.dtype, device="cuda")
    if argument.is_floating_point():
        values = values.normal_() if argument.dim() > 1 else values.uniform_(0.5, 1.5)
    return values.as_strided(argument.shape, argument.stride())


def write_results(path: Path, results: object) -> None:
    """Writes results as JSON in place of a file, which is complete at every moment, whenever the process may end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1, default=str))
    partial.replace(path)


def synchronize() -> None:
    """Waits for the GPU; raises what a kernel did wrong."""
    if _has_gpu():
        torch.cuda.synchronize()


def _has_gpu() -> bool:
    return torch.cuda.is_available() and not _simulated()


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
