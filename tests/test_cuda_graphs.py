"""The cache of CUDA graphs, with stand-ins for a GPU's graphs, streams and events."""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import randomize
from torch import Tensor

import effnet_kernels as ek
from effnet_kernels import use_backend
from effnet_kernels.inference.cuda_graphs import GraphCache
from effnet_kernels.tools import timing


class Event:
    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...


class Graph:
    """Computes again, from the memory it was captured with into the memory it was captured with."""

    captured: tuple[Tensor, list[Tensor]]

    def replay(self) -> None:
        x, outputs = self.captured
        for kept, y in zip(outputs, [x.square(), x.sum(dim=(2, 3))], strict=True):
            kept.copy_(y)


class Maps:
    """A network that remembers its last call."""

    last: tuple[Tensor, list[Tensor]]

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.last = x, [x.square(), x.sum(dim=(2, 3))]
        return self.last[1]


@pytest.fixture
def maps() -> Maps:
    return Maps()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, maps: Maps) -> list[tuple[int, ...]]:
    """The shapes that were captured, in order."""
    shapes: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        yield
        graph.captured = maps.last
        shapes.append(tuple(maps.last[0].shape))

    monkeypatch.setattr(torch.cuda, "graph", capture)
    for name, stand_in in (("CUDAGraph", Graph), ("Stream", Stream), ("Event", Event), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: contextlib.nullcontext())
    return shapes


def test_outputs_are_the_callers(maps: Maps, captures: list) -> None:
    cache = GraphCache(maps)
    images = [torch.randn(2, 3, 8, 6) for _ in range(4)]
    images[1] = images[1].contiguous(memory_format=torch.channels_last)
    outputs = [cache(x) for x in images]
    for x, actual in zip(images, outputs, strict=True):
        torch.testing.assert_close(actual, [x.square(), x.sum(dim=(2, 3))])
    assert captures == [(2, 3, 8, 6)]


def test_the_shapes_used_last_stay(maps: Maps, captures: list) -> None:
    cache = GraphCache(maps, limit=2)
    for batch in (1, 2, 1, 3, 1, 2):
        cache(torch.randn(batch, 3, 4, 4))
    # Three pushed two out, which had not been used since one had.
    assert [shape[0] for shape in captures] == [1, 2, 3, 2]
    assert len(cache) == 2


def test_a_capture_under_inference_mode_serves_calls_outside_of_it(maps: Maps, captures: list) -> None:
    cache, x = GraphCache(maps), torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        cache(torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(cache(x)[0], x.square())
    assert len(captures) == 1


def test_what_is_forced_is_captured_by_itself(maps: Maps, captures: list) -> None:
    cache, x = GraphCache(maps), torch.randn(2, 3, 4, 4)
    cache(x)
    with use_backend("torch"):
        cache(x)
    cache(x)
    assert len(captures) == 2


def test_what_decides_the_launches_is_part_of_a_graph(maps: Maps, captures: list) -> None:
    cache, x = GraphCache(maps), torch.randn(1, 3, 4, 4)
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for precisions in 2 * list(itertools.product(("ieee", "tf32"), repeat=2)):
            for setting, precision in zip(settings, precisions, strict=True):
                setting.fp32_precision = precision
            cache(x)
        assert len(captures) == 4
        with use_backend("reference"):
            cache(x)
        assert len(captures) == 5
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_an_engine_with_other_weights_has_other_graphs(maps: Maps, captures: list) -> None:
    engine = ek.freeze(randomize(ek.efficientnet_b0(num_classes=2)))
    before = engine.graphs()
    assert engine.graphs() is before
    engine.load_state_dict({key: t + 1.0 for key, t in engine.state_dict().items()}, assign=True)
    assert engine.graphs() is not before


def test_several_threads(maps: Maps, captures: list) -> None:
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


def test_a_timed_graph_keeps_what_it_reads(captures: list) -> None:
    class Step:
        def __call__(self) -> None: ...

    step = Step()
    kept = weakref.ref(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        replay = timing.graphed(step)
    del step
    assert kept() is not None
    del replay
    assert kept() is None
