"""Blocks whose operands lie in memory in any legal way: input, weights, buffers, gradients and saved tensors."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from block_cases import BLOCKS
from conftest import TOLERANCES, assert_close, randomize, relative_rms, traces_operators
from native_cases import needs_native
from torch import Tensor, nn
from variations import other_memory

from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.modules import MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

NAMES = ["expand", "no expand, residual", "same padding", "fused, residual", "fused, one convolution", "stem", "head"]


def make(name: str, training: bool) -> tuple[nn.Module, Tensor]:
    builder, shape = BLOCKS[name]
    return randomize(builder()).train(training), torch.randn(shape).contiguous(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor, restride: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
    """Output, the gradients of the input and the parameters, and the buffers after a step on the CPU's kernels."""
    block = copy.deepcopy(block)
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    with select.use_backend("cpu"):
        y = block(x)
        grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).contiguous(memory_format=torch.channels_last)
        y.backward(restride(grad))
    for parameter in block.parameters():
        assert parameter.grad is not None
    return [y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for ours, right in zip(actual, expected, strict=True):
        assert ours.shape == right.shape, what
        error = relative_rms(ours, right)
        assert error <= TOLERANCES[torch.float32], f"{what}: {error:.2e}"


def with_tensor(block: nn.Module, name: str, t: Tensor) -> nn.Module:
    """A copy of the block with a parameter or a buffer in this tensor's memory."""
    block = copy.deepcopy(block)
    owner, _, leaf = name.rpartition(".")
    module = block.get_submodule(owner)
    kind = module._parameters if leaf in module._parameters else module._buffers
    kind[leaf] = nn.Parameter(t) if leaf in module._parameters else t
    return block


def tensors_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    for name, buffer in block.named_buffers():
        if buffer.dim() > 0:
            yield name, buffer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_any_memory_of_the_input(name: str, training: bool) -> None:
    block, x = make(name, training)
    expected = step(block, x)
    for what, other in other_memory(x):
        assert_same(step(block, other), expected, what)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_any_memory_of_parameters_and_buffers(name: str, training: bool) -> None:
    block, x = make(name, training)
    expected = step(block, x)
    for tensor_name, tensor in tensors_of(block):
        for what, other in other_memory(tensor.detach()):
            assert_same(step(with_tensor(block, tensor_name, other), x), expected, f"{tensor_name}, {what}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_any_memory_of_the_gradient(name: str, training: bool) -> None:
    block, x = make(name, training)
    expected = step(block, x)
    grads: list[Tensor] = []
    step(block, x, lambda g: grads.append(g) or g)
    for what, other in other_memory(grads[0]):
        assert_same(step(block, x, lambda g, other=other: other), expected, what)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_any_memory_of_saved_tensors(name: str, training: bool) -> None:
    block, x = make(name, training)
    expected = step(block, x)
    kinds = [what for what, _ in other_memory(torch.randn(2, 3, 4, 5))]
    for kind in [*kinds, "saved on the CPU"]:

        def unpack(t: Tensor, kind: str = kind) -> Tensor:
            if kind == "saved on the CPU":
                return torch.empty(t.shape).copy_(t)
            return dict(other_memory(t)).get(kind, t)

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            assert_same(step(block, x), expected, kind)


def test_save_on_cpu_trains() -> None:
    block, x = make("expand", True)
    expected = step(block, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(block, x), expected, "save_on_cpu")


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_in_both_modes(mode: str) -> None:
    block, x = make("stochastic depth", True)
    block.stochastic_depth.mode = mode
    ours = step(block, x)
    torch.manual_seed(1)
    exact, input = copy.deepcopy(block).double(), x.double().requires_grad_()
    with select.use_backend("torch"):
        # The draws of the two dtypes differ.
        drawn = block.stochastic_depth.drop_path_scale(x)
        exact.stochastic_depth.forward = lambda y: y * drawn.double().view(-1, 1, 1, 1)
        y = exact(input)
    y.backward(torch.linspace(-1, 1, y.numel()).double().reshape(y.shape))
    assert_close(ours[0], y.float())
    assert_close(ours[1], input.grad.float())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_their_parameters_strides(layout: torch.memory_format) -> None:
    for name in NAMES:
        block, x = make(name, True)
        block = block.to(memory_format=layout)
        step_block = copy.deepcopy(block)
        with select.use_backend("cpu"):
            step_block(x).sum().backward()
        for key, p in step_block.named_parameters():
            assert p.grad.stride() == p.stride(), f"{name}: {key}"


@traces_operators
def test_strided_weights_under_compile() -> None:
    block, x = make("expand", True)
    expected = step(block, x)
    for key in ("block.0.0.weight", "block.1.0.weight", "block.2.fc1.weight", "block.3.0.weight", "block.1.1.weight"):
        weight = block.get_parameter(key).detach()
        for what in (f"order {tuple(range(weight.dim()))[::-1]}", "step 2 in dimension 0"):
            changed = with_tensor(block, key, dict(other_memory(weight))[what])
            torch._dynamo.reset()
            compiled = torch.compile(changed, backend="aot_eager", fullgraph=True)
            input = x.detach().requires_grad_()
            y = compiled(input)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).contiguous(memory_format=torch.channels_last))
            actual = [y, input.grad, *(p.grad for p in changed.parameters())]
            assert_same(actual, expected[: len(actual)], f"{key}, {what}")


def operator_calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    from effnet_kernels.fusion.spec import Epilogue, Prologue

    x, scale, shift = torch.randn(2, 8, 5, 6), torch.rand(8) + 0.5, torch.randn(8)
    w, taps, bias = torch.randn(16, 8, 1, 1), torch.randn(8, 1, 3, 3), torch.randn(16)
    gate, keep, residual = torch.rand(2, 8), torch.tensor([0.0, 2.0]), torch.randn(2, 8, 5, 6)
    w1, b1, w2, b2 = torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8)
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    bn = (taps, scale, shift, mean, var)
    return {
        "pointwise_conv": (
            lambda x, w, b, s, t, g: ops.pointwise_conv(x, w, b, Prologue(s, t, "silu", g))[0],
            [x, w, bias, scale, shift, gate],
        ),
        "pointwise_conv, epilogue": (
            lambda x, w, s, r: ops.pointwise_conv(x, w, None, None, Epilogue(s, None, "relu", r))[0],
            [x, torch.randn(8, 8, 1, 1), scale, residual],
        ),
        "pointwise_conv, statistics": (
            lambda x, w: ops.pointwise_conv(x, w, reduction="statistics")[1],
            [x, w],
        ),
        "depthwise_conv": (
            lambda x, w, s, t: ops.depthwise_conv(x, w, 2, 1, Prologue(s, t, "hardswish"))[0],
            [x, taps, scale, shift],
        ),
        "depthwise_conv_bn_silu": (
            lambda x, w, g, b, m, v: ops.depthwise_conv_bn_silu(x, w, g, b, m.detach(), v.detach(), 1, 1),
            [x, *bn],
        ),
        "squeeze": (lambda x, s, t: ops.squeeze(x, Prologue(s, t, "silu")), [x, scale, shift]),
        "excite": (lambda *t: ops.excite(*t), [torch.randn(2, 8), w1, b1, w2, b2]),
        "squeeze_excite": (lambda *t: ops.squeeze_excite(*t), [x, w1, b1, w2, b2]),
        "bn_act_add": (
            lambda x, s, t, r, k: ops.bn_act_add(x, Prologue(s, t, "relu6"), r, k.detach()),
            [x, scale, shift, residual, keep],
        ),
        "channel_statistics": (lambda x: ops.channel_statistics(x.detach()).requires_grad_(), [x]),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_any_memory_of_the_public_operators(name: str) -> None:
    function, operands = operator_calls()[name]

    def results(operands: list[Tensor], kind: str = "") -> list[Tensor]:
        operands = [t.detach().requires_grad_() for t in operands]
        y = function(*operands)
        grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        y.backward(dict(other_memory(grad)).get(kind, grad))
        return [y, *(t.grad for t in operands if t.grad is not None)]

    with select.use_backend("cpu"):
        expected = results(operands)
        for index, operand in enumerate(operands):
            for what, other in other_memory(operand):
                changed = [*operands[:index], other, *operands[index + 1 :]]
                assert_same(results(changed), expected, f"operand {index}, {what}")
        for kind in [what for what, _ in other_memory(expected[0].detach())]:
            assert_same(results(operands, kind), expected, f"gradient, {kind}")


def test_frozen_engines_take_any_memory_of_images_and_weights() -> None:
    from effnet_kernels import EfficientNet, freeze

    model = randomize(EfficientNet([MBConvConfig(4, 3, 2, 8, 16, 1)], 0.0, num_classes=3)).eval()
    x = torch.randn(2, 3, 13, 14)
    with torch.no_grad():
        expected = freeze(model)(x)
        for what, other in other_memory(x):
            assert_same([freeze(model)(other)], [expected], what)
        for name, tensor in tensors_of(model):
            for what, other in other_memory(tensor.detach()):
                changed = with_tensor(model, name, other)
                if what == "negated lazily" and name.startswith("features"):
                    with pytest.raises(ValueError, match="negated lazily"):
                        freeze(changed)
                    continue
                assert_same([freeze(changed)(x)], [expected], f"{name}, {what}")
