"""Training on the native kernels: blocks against float64, a network against torchvision, and what it saves."""

import copy

import pytest
import torch
from block_cases import BLOCKS, compare, run
from conftest import assert_gradients_close, randomize
from native_cases import needs_native, running
from torch import nn

import effnet_kernels as ek
from effnet_kernels.backends import select

pytestmark = needs_native


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("training", "with_grad"), [(True, True), (False, False), (False, True), (True, False)])
def test_blocks(name, training, with_grad):
    compare(name, "cpu", channels_last, torch.float32, training, with_grad)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    y = model(x)
    torch.nn.functional.cross_entropy(y, torch.arange(len(x))).backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def test_threads_change_no_bit_of_a_block():
    make, shape = BLOCKS["expand stride 2"]
    block, x = randomize(make()), channels_last(16, *shape[1:])
    results = []
    for threads in (1, 2, 5):
        copied = copy.deepcopy(block)
        with running(None, threads):
            y, grad = run(copied, x, torch.ones(16, 40, 14, 14), "cpu")
        results.append([y, grad, *(p.grad for p in copied.parameters()), *copied.buffers()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_losses_of_five_steps_are_torchvisions():
    tv = pytest.importorskip("torchvision.models", reason="compares with torchvision, the extra 'test'")
    x, target = torch.randn(8, 3, 96, 96), torch.arange(8)
    losses = []
    for make in (tv.efficientnet_b0, ek.efficientnet_b0):
        torch.manual_seed(0)
        model = make().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(1)
        run = []
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    # From step to step training magnifies rounding, here to 2e-5.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps for backward beside parameters and the input, each memory once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def test_memory_saved_for_backward():
    model, x = ek.efficientnet_b0().train(), torch.randn(2, 3, 224, 224)
    ours = saved_bytes(model, x)
    with select.use_backend("torch"):
        eager = saved_bytes(model, x)
    assert ours <= 0.40 * eager
    assert ours <= 0.40 * 88.3e6 * len(x)


def test_frozen_parts_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    make, shape = BLOCKS["expand"]
    block, x = randomize(make()), channels_last(*shape)
    twin = copy.deepcopy(block)
    for name, p in block.named_parameters():
        p.requires_grad_("block.3" in name)
    _, grad = run(block, x, torch.ones(3, 16, 15, 17), "cpu")
    assert all((p.grad is None) == (not p.requires_grad) for p in block.parameters())
    for p in block.parameters():
        p.requires_grad_(True)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpoint(block, leaf, use_reentrant=False).sum().backward()
    _, expected = run(twin, x, torch.ones(3, 16, 15, 17), "cpu")
    assert_gradients_close(block, twin)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(grad, expected)


def test_several_threads_train_at_once():
    import threading

    make, shape = BLOCKS["expand"]
    block, x = randomize(make()), channels_last(*shape)

    def train(results: list, index: int) -> None:
        # Nothing is forced here: use_backend is for one thread at a time.
        copied, leaf = copy.deepcopy(block), x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = copied(leaf)
        y.sum().backward()
        results[index] = [y.detach(), leaf.grad, *(p.grad for p in copied.parameters())]

    alone: list = [None]
    train(alone, 0)
    together: list = [None] * 4
    threads = [threading.Thread(target=train, args=(together, index)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in together:
        assert all(torch.equal(a, b) for a, b in zip(alone[0], result, strict=True))
