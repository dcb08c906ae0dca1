"""Values that hold inside a ``with`` block: in its thread, in autograd's, and in no other."""

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import TRACES_OPERATORS, randomize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effnet_kernels.backends import select
from effnet_kernels.backends.scoped_value import ScopedValue
from effnet_kernels.modules import ConvBnAct


def test_blocks_nest_and_end() -> None:
    value: ScopedValue[str] = ScopedValue("test")
    assert value.get() is None
    with value.bound_to("outer"):
        with value.bound_to("inner"):
            assert value.get() == "inner"
        assert value.get() == "outer"
        with contextlib.suppress(KeyError), value.bound_to("inner"):
            raise KeyError
        assert value.get() == "outer"
    assert value.get() is None


def test_references_are_counted() -> None:
    value: ScopedValue[object] = ScopedValue("test")
    held = object()
    before = sys.getrefcount(held), sys.getrefcount(None)
    for _ in range(100):
        with value.bound_to(held), value.bound_to(held):
            assert value.get() is held
    # Nothing else of an interpreter drops a hundred references to None meanwhile.
    assert sys.getrefcount(held) == before[0]
    assert abs(sys.getrefcount(None) - before[1]) < 50


def test_other_threads_do_not_see_it() -> None:
    value: ScopedValue[str] = ScopedValue("test")
    with value.bound_to("mine"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(value.get).result() is None

        def other() -> str | None:
            with value.bound_to("theirs"):
                return value.get()

        assert pool.submit(other).result() == "theirs"
        assert value.get() == "mine"


class Nested(torch.autograd.Function):
    """Starts a backward pass inside of its own, ``depth`` times; so deep ones go to other threads of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, observe: Any) -> Tensor:
        ctx.depth, ctx.observe = depth, observe
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.observe()
        if ctx.depth > 0:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.observe).backward()
        return grad, None, None


def test_autograds_threads_see_it() -> None:
    value: ScopedValue[str] = ScopedValue("test")
    seen = set()

    def observe() -> None:
        seen.add((threading.get_ident(), value.get(), select.forced()))

    with value.bound_to("mine"), select.use_backend("torch"):
        Nested.apply(torch.ones(1, requires_grad=True), 100, observe).backward()
    threads = {thread for thread, *_ in seen}
    assert len(threads) > 1
    assert {entry[1:] for entry in seen} == {("mine", "torch")}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_runs_on_the_forced_backend(backend: str, use_reentrant: bool) -> None:
    layer = randomize(ConvBnAct(8, 16, 1))
    chosen = []
    layer.register_forward_pre_hook(lambda module, inputs: chosen.append(layer.choose(inputs[0]).backend))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with select.use_backend(backend):
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert chosen == [backend, backend]


def test_blocks_of_threads_that_end_in_any_order_leave_no_backend_to_a_tracer() -> None:
    first, second = select.use_backend("torch"), select.use_backend("reference")
    with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as another:
        other.submit(first.__enter__).result()
        another.submit(second.__enter__).result()
        assert select._traced_override == "reference"
        other.submit(first.__exit__, None, None, None).result()
        assert select._traced_override == "reference"
        another.submit(second.__exit__, None, None, None).result()
    assert select._traced_override is None


@pytest.mark.skipif(not TRACES_OPERATORS, reason="before torch 2.11 the eager path is compiled")
def test_a_block_can_be_traced() -> None:
    def forced_inside(x: Tensor) -> Tensor:
        with select.use_backend("reference"):
            return x + 1

    compiled = torch.compile(forced_inside, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert select._traced_override is None


def test_no_block_is_lost_while_others_end() -> None:
    def lost(count: int) -> int:
        missed = 0
        for _ in range(count):
            with select.use_backend("reference"):
                missed += select._traced_override is None or not select._entered
        return missed

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(lost, [2000] * 4)) == 0
    finally:
        sys.setswitchinterval(interval)
    assert select._traced_override is None
