"""The cache of CUDA graphs, with stand-ins for a GPU's graphs, streams and events."""

import contextlib
import threading

import pytest
import torch
from torch import Tensor

from effnet_kernels import cuda_graphs
from effnet_kernels.cuda_graphs import GraphCache


class Event:
    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def wait_event(self, event: object) -> None: ...


class Graph:
    """Computes again, from the memory it was captured with into the memory it was captured with."""

    def __init__(self, run, x: Tensor, outputs: list[Tensor]) -> None:
        self.run, self.x, self.outputs = run, x, outputs

    def replay(self) -> None:
        for kept, y in zip(self.outputs, self.run(self.x), strict=True):
            kept.copy_(y)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that were captured, in order."""
    shapes: list[tuple[int, ...]] = []

    def capture(run, x: Tensor) -> cuda_graphs._Captured:
        shapes.append(tuple(x.shape))
        kept = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        outputs = run(kept)
        return cuda_graphs._Captured(Graph(run, kept, outputs), kept, outputs, Event())

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return shapes


def maps(x: Tensor) -> list[Tensor]:
    return [x.square(), x.sum(dim=(2, 3))]


def test_outputs_are_the_callers(captures: list) -> None:
    cache = GraphCache(maps)
    images = [torch.randn(2, 3, 8, 6) for _ in range(4)]
    images[1] = images[1].contiguous(memory_format=torch.channels_last)
    outputs = [cache(x) for x in images]
    for x, actual in zip(images, outputs, strict=True):
        for y, expected in zip(actual, maps(x), strict=True):
            torch.testing.assert_close(y, expected)
    assert captures == [(2, 3, 8, 6)]


def test_the_shapes_used_last_stay(captures: list) -> None:
    cache = GraphCache(maps, limit=2)
    for batch in (1, 2, 1, 3, 1, 2):
        cache(torch.randn(batch, 3, 4, 4))
    # Three pushed two out, which had not been used since one had.
    assert [shape[0] for shape in captures] == [1, 2, 3, 2]
    assert len(cache) == 2


def test_several_threads(captures: list) -> None:
    cache, wrong = GraphCache(maps, limit=2), []

    def work(batch: int) -> None:
        for _ in range(30):
            x = torch.randn(batch, 3, 4, 4)
            if not torch.equal(cache(x)[0], x.square()):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
