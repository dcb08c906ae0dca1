"""Operands of any strides, in-place operations on a block's output and batched gradients, on the GPU kernels."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCES, randomize, relative_rms
from operator_arguments import recorded_outputs
from torch import Tensor, nn
from variations import other_memory

from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.fusion.spec import ACTIVATIONS, Prologue
from effnet_kernels.modules import ConvBnAct, MBConvConfig
from gpu.compare import channels_last


def mbconv() -> tuple[nn.Module, Tensor]:
    config = MBConvConfig(2, 3, 1, 16, 16, 1)
    block = randomize(config.block(config, 0.5, nn.BatchNorm2d)).train()
    # One draw for the whole batch is a factor in stride 0.
    block.stochastic_depth.mode = "batch"
    return block, channels_last(2, 16, 5, 6)


def stem() -> tuple[nn.Module, Tensor]:
    return randomize(ConvBnAct(3, 16, 3, 2)).train(), channels_last(2, 3, 9, 8)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBnAct(16, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.pooled(x)


BLOCKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mbconv": mbconv,
    "stem": stem,
    "head, pooled": lambda: (randomize(Head()).train(), channels_last(2, 16, 5, 6)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    block, x = BLOCKS[name]()
    return block.cuda(), x


def gradient_of(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)


def step(block: nn.Module, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    # Of these seeds, one that keeps the branch.
    torch.manual_seed(2)
    with select.use_backend("triton"):
        y = block(x)
        y.backward(gradient_of(y) if grad is None else grad)
    return [y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for ours, right in zip(actual, expected, strict=True):
        error = relative_rms(ours.cpu(), right.cpu())
        assert error <= TOLERANCES[torch.float32], f"{what}: {error:.2e}"


@pytest.mark.parametrize("name", BLOCKS)
def test_any_memory_of_every_operand(name: str) -> None:
    """Each operand in other memory; the kinds of memory take turns, because every step takes a second."""
    block, x = made(name)
    expected = step(block, x)
    turn = itertools.count()

    def other(t: Tensor) -> tuple[str, Tensor]:
        kinds = [(what, o) for what, o in other_memory(t) if what != "negated lazily"]
        return kinds[(5 * next(turn) + 1) % len(kinds)]

    for _ in range(3):
        what, changed = other(x)
        assert_same(step(block, changed), expected, f"input, {what}")
        what, changed = other(gradient_of(expected[0]))
        assert_same(step(block, x, changed), expected, f"gradient, {what}")
    for key, parameter in block.named_parameters():
        owner, _, leaf = key.rpartition(".")
        what, changed = other(parameter.detach())
        copied = copy.deepcopy(block)
        copied.get_submodule(owner)._parameters[leaf] = nn.Parameter(changed)
        assert_same(step(copied, x), expected, f"{key}, {what}")
    for key, buffer in block.named_buffers():
        if buffer.dim() == 0:
            continue
        owner, _, leaf = key.rpartition(".")
        what, changed = other(buffer)
        copied = copy.deepcopy(block)
        copied.get_submodule(owner)._buffers[leaf] = changed
        assert_same(step(copied, x), expected, f"{key}, {what}")


@pytest.mark.parametrize("name", BLOCKS)
def test_saved_tensors_that_lost_their_strides(name: str) -> None:
    block, x = made(name)
    expected = step(block, x)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach(), lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
    ):
        assert_same(step(block, x), expected, "contiguous")


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_are_tensors_of_their_own(name: str) -> None:
    block, x = made(name)
    for training in (True, False):
        with select.use_backend("triton"):
            y = block.train(training)(x.requires_grad_(training))
        assert not y._is_view()
        F.relu(y, inplace=True).sum().backward()


@pytest.mark.parametrize("name", BLOCKS)
def test_batches_of_gradients(name: str) -> None:
    block, x = made(name)
    inputs = [x.requires_grad_(), *block.parameters()]
    with select.use_backend("triton"):
        y = block(x)
    grads = torch.linspace(-1, 1, 2 * y.numel(), device=y.device).reshape(2, *y.shape)
    one_by_one = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in grads]
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True)
    for g, *items in zip(batched, *one_by_one, strict=True):
        assert torch.equal(g, torch.stack(items))


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act not in ("none", "silu")])
def test_derivatives_at_kinks_and_at_nan(act: str) -> None:
    values = [-4.0, -3.0, 0.0, 1.5, 3.0, 6.0, 7.0, float("nan")]
    x = torch.tensor(values, device="cuda").view(1, 8, 1, 1).requires_grad_()
    with select.use_backend("triton"):
        ops.bn_act_add(x, Prologue(act=act)).backward(torch.ones(1, 8, 1, 1, device="cuda"))
    for value, slope in zip(values, x.grad.flatten(), strict=True):
        z = torch.tensor([value], requires_grad=True)
        getattr(F, act)(z).backward(torch.ones(1))
        assert torch.allclose(slope.cpu(), z.grad[0]), value


@pytest.mark.parametrize("momentum", [1.0, 0.1])
def test_running_statistics_at_any_momentum(momentum: float) -> None:
    block, x = made("stem")
    block[1].momentum = momentum
    block[1].running_mean.fill_(1e4)
    block[1].running_var.fill_(1e6)
    exact = copy.deepcopy(block).double()
    with select.use_backend("triton"):
        block(x)
    with select.use_backend("torch"):
        exact(x.double())
    for ours, right in zip(block.buffers(), exact.buffers(), strict=True):
        assert torch.allclose(ours.double(), right.double(), rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True)])
def test_prologues_of_one_part(scale: bool, shift: bool) -> None:
    x = channels_last(2, 16, 5, 6)
    s = torch.rand(16, device="cuda") + 0.5 if scale else None
    t = torch.randn(16, device="cuda") if shift else None
    w, taps = torch.randn(24, 16, 1, 1, device="cuda"), torch.randn(16, 1, 3, 3, device="cuda")
    for operator in (
        lambda x, s, t: ops.pointwise_conv(x, w.to(x), None, Prologue(s, t, "silu"))[0],
        lambda x, s, t: ops.depthwise_conv(x, taps.to(x), 1, 1, Prologue(s, t, "silu"))[0],
        lambda x, s, t: ops.squeeze(x, Prologue(s, t, "silu")),
        lambda x, s, t: ops.bn_act_add(x, Prologue(s, t, "silu")),
    ):
        outcomes = []
        for dtype in (torch.float32, torch.float64):
            inputs = [None if v is None else v.detach().to(dtype).requires_grad_() for v in (x, s, t)]
            y = operator(*inputs)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype, device=y.device).reshape(y.shape))
            outcomes.append([y, *(v.grad for v in inputs if v is not None)])
        assert_same(outcomes[0], outcomes[1], "a prologue of one part")


def test_recorded_operators_run_on_the_kernels() -> None:
    for name, y in recorded_outputs("cuda").items():
        assert type(y.grad_fn).__name__ == f"{name}Backward"
