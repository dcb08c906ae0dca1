"""Replaying a network's launches as CUDA graphs, one for each shape of input."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.triton.configs import tuned_configs

# Calls before a capture, in which kernels are compiled and libraries allocate their memory.
_WARMUP = 3
# PyTorch allows one capture at a time in a process.
_capturing = threading.Lock()


class _Captured(NamedTuple):
    """A graph, the memory that it reads and writes, and the event behind its last use."""

    graph: Any
    x: Tensor
    outputs: list[Tensor]
    done: Any


class GraphCache:
    """Calls ``run`` on a GPU by replaying its launches for an earlier input of the same shape.

    The ``limit`` shapes used last keep their graphs; one more pushes the oldest out. Any thread and any stream may
    call, and the outputs belong to the caller.

    Args:
        run: from images of one dtype on one device to maps, without synchronising or reading values on the host.
        limit: how many graphs are kept.
    """

    def __init__(self, run: Callable[[Tensor], list[Tensor]], limit: int = 8) -> None:
        self._run = run
        self._limit = limit
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> list[Tensor]:
        # What decides the launches, beside the shape, is part of what was captured.
        key = tuple(x.shape), select.forced(), tuned_configs.generation(), *_precisions()
        with self._lock, torch.cuda.device(x.device):
            captured = self._captured.pop(key, None)
            if captured is None:
                with _capturing:
                    captured = _capture(self._run, x)
                while len(self._captured) >= self._limit:
                    _, oldest = self._captured.popitem(last=False)
                    oldest.done.synchronize()
            self._captured[key] = captured
            stream = torch.cuda.current_stream()
            # Another stream may still be reading what the last replay wrote.
            stream.wait_event(captured.done)
            captured.x.copy_(x)
            captured.graph.replay()
            outputs = [y.clone() for y in captured.outputs]
            captured.done.record(stream)
        return outputs

    def __len__(self) -> int:
        return len(self._captured)

    def __del__(self) -> None:
        # The memory of a graph may only be used again behind its last replay, on whichever stream that was.
        for captured in self._captured.values():
            captured.done.synchronize()


def _precisions() -> tuple[str, str]:
    """Of float32 products in convolutions, the kernels' too, and in the fully connected layer behind them."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return conv.fp32_precision, matmul.fp32_precision


# Tensors made under inference_mode could not be written outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def _capture(run: Callable[[Tensor], list[Tensor]], x: Tensor) -> _Captured:
    kept = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            run(kept)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating while this one captures.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = run(kept)
    return _Captured(graph, kept, outputs, torch.cuda.Event())
