"""Training steps replayed by ``torch.cuda.make_graphed_callables`` against the same steps without graphs.

In the simulator stand-ins take the place of CUDA's graphs: what a step does on the device, torch's operations and
launches, is recorded at the capture and done again at each replay, on the same memory. A step that computed something
on the host, or anew at each call, would not repeat.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from effnet_kernels import EfficientNet
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.launch import simulated, timed_by
from effnet_kernels.modules import FusedMBConvConfig, MBConvConfig
from effnet_kernels.tools.warmup import gpu_autocast
from gpu.compare import channels_last


class Graph(TorchDispatchMode):
    """A stand-in for a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        outputs = func(*args, **kwargs)
        returns = func._schema.returns
        if func._schema.is_mutable:
            self.recorded.append(lambda: func(*args, **kwargs))
        elif not any(value.alias_info for value in returns) and "empty" not in func.name():

            def again() -> None:
                for kept, made in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, Tensor):
                        kept.copy_(made)

            self.recorded.append(again)
        return outputs

    def launched(self, kernel: object, run: Callable[[], None]) -> None:
        self.recorded.append(run)
        # What the simulator does with torch's operations is not the step's.
        with _disable_current_modes():
            run()

    def replay(self) -> None:
        with torch.no_grad():
            for action in self.recorded:
                action()


class Stream:
    def wait_stream(self, stream: object) -> None: ...


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not simulated():
        return

    @contextlib.contextmanager
    def capture(graph: Graph, **settings: object) -> Iterator[None]:
        with graph, timed_by(graph.launched):
            yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: (0, 0))


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast without its cache of weights, as graphs want it; also for the simulator's tensors, the host's."""
    devices = ("cuda", "cpu") if simulated() else ("cuda",)
    with contextlib.ExitStack() as stack:
        for device in devices:
            enabled = dtype is not None
            stack.enter_context(torch.autocast(device, dtype or torch.float16, enabled=enabled, cache_enabled=False))
        if simulated():
            stack.enter_context(gpu_autocast(dtype))
        yield


def network() -> EfficientNet:
    settings = [FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 1, 8, 8, 1)]
    return randomize(EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, num_classes=5)).cuda().train()


def steps(model: nn.Module, run: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> list[float]:
    """The losses of three steps on three batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    labels = torch.arange(4, device="cuda")
    losses = []
    for index in range(3):
        torch.manual_seed(index)
        x = channels_last(4, 3, 16, 16)
        optimizer.zero_grad()
        with autocast(dtype):
            loss = F.cross_entropy(run(x).float(), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_replayed_steps_are_those_without_graphs(dtype: torch.dtype | None) -> None:
    model, x = network(), channels_last(4, 3, 16, 16)
    start, eager = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with select.use_backend("triton"):
        with autocast(dtype):
            graphed = torch.cuda.make_graphed_callables(model, (x,))
        # The calls before the capture have moved the running statistics.
        model.load_state_dict(start)
        losses = steps(model, graphed, dtype)
        assert losses == steps(eager, eager, dtype)
    assert len(set(losses)) == 3
    for ours, right in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, right)
