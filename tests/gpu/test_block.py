"""Blocks on the Triton kernels against the eager modules in float64: outputs, every gradient, running statistics."""

import copy
from collections.abc import Callable
from functools import partial

import block_cases
import pytest
import torch
from block_cases import BLOCKS, THIRD_PARTY_BLOCKS, BatchNorm, mbconv, run
from conftest import assert_buffers_close, randomize, relative_rms
from torch import Tensor, nn

from effnet_kernels import EfficientNet, accelerate, explain, ops
from effnet_kernels.backends import select
from effnet_kernels.modules import ConvBnAct, FusedMBConvConfig, MBConvConfig, SqueezeExcitation
from gpu.compare import assert_accurate, channels_last

compare = partial(block_cases.compare, backend="triton", channels_last=channels_last)


@pytest.mark.parametrize("name", BLOCKS)
def test_training(name: str) -> None:
    compare(name, dtype=torch.float32, training=True, with_grad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["expand", "expand stride 2", "no expand", "fused, residual", "stem"])
def test_training_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype=dtype, training=True, with_grad=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name: str) -> None:
    compare(name, dtype=torch.float32, training=False, with_grad=False)


@pytest.mark.parametrize("name", ["expand", "no expand", "fused", "head"])
def test_inference_in_half_precision(name: str) -> None:
    compare(name, dtype=torch.float16, training=False, with_grad=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", THIRD_PARTY_BLOCKS)
def test_accelerated_blocks(name: str, training: bool) -> None:
    pytest.importorskip(name.partition(",")[0], reason="accelerates its blocks, the extra 'third-party'")
    compare(name, dtype=torch.float32, training=training, with_grad=training)


@pytest.mark.parametrize("name", ["expand", "fused"])
def test_training_with_frozen_statistics(name: str) -> None:
    compare(name, dtype=torch.float32, training=False, with_grad=True)


def test_statistics_without_gradients() -> None:
    """A train-mode pass under no_grad moves the running statistics."""
    compare("expand", dtype=torch.float32, training=True, with_grad=False)


def test_repeats_bitwise() -> None:
    make, shape = BLOCKS["expand"]
    block, x = randomize(make()).cuda(), channels_last(*shape)
    results = []
    for _ in range(2):
        copied = copy.deepcopy(block)
        y, grad_x = run(copied, x, torch.ones(3, 16, 15, 17, device="cuda"), "triton")
        results.append([y, grad_x, *(p.grad for p in copied.parameters()), *copied.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cumulative_average() -> None:
    """momentum=None averages over all batches, with the count read on the device."""
    block = randomize(ConvBnAct(16, 24, 1, 1, 1, partial(nn.BatchNorm2d, momentum=None))).cuda()
    exact = copy.deepcopy(block)
    for step in range(3):
        x = channels_last(2, 16, 5, 7) + step
        run(block, x, None, "triton")
        run(exact, x, None, "torch")
    assert_buffers_close(block, exact)


def test_parts_that_need_no_gradient() -> None:
    make, shape = BLOCKS["expand"]
    block, x = randomize(make()).cuda(), channels_last(*shape)
    exact = copy.deepcopy(block)
    for model in (block, exact):
        for name, p in model.named_parameters():
            p.requires_grad_("block.3" in name)
    _, grad_x = run(block, x, torch.ones(3, 16, 15, 17, device="cuda"), "triton")
    _, grad_exact = run(exact, x, torch.ones(3, 16, 15, 17, device="cuda"), "torch")
    assert_accurate(grad_x, grad_exact)
    assert all((p.grad is None) == (not p.requires_grad) for p in block.parameters())


@pytest.mark.parametrize("skip", [False, True])
def test_running_statistics_of_nonfinite_batches(skip: bool) -> None:
    block_cases.check_nonfinite_batches("triton", channels_last, skip)


def test_contiguous_input_gives_contiguous_output() -> None:
    make, shape = BLOCKS["expand"]
    block, x = randomize(make()).eval().cuda(), channels_last(*shape)
    y, _ = run(block, x, None, "triton")
    z, _ = run(block, x.contiguous(), None, "triton")
    assert z.is_contiguous()
    assert torch.equal(y, z)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ConvBnAct(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.pooled(x)


def timm_depthwise_block() -> nn.Module:
    from timm.layers import BatchNormAct2d
    from timm.models._efficientnet_blocks import ConvBnAct as TimmBlock

    layers = {"act_layer": nn.SiLU, "norm_layer": BatchNormAct2d}
    return accelerate(TimmBlock(8, 8, 3, group_size=1, skip=True, drop_path_rate=0.5, **layers))


@pytest.mark.parametrize("make", [Pooled, timm_depthwise_block])
def test_chains_that_end_in_a_depthwise_convolution(make: Callable[[], nn.Module]) -> None:
    block = randomize(make()).train().cuda()
    x = channels_last(4, 8, 7, 5)
    exact = copy.deepcopy(block).double()
    grad = torch.randn(4, 8).cuda() if make is Pooled else channels_last(4, 8, 7, 5)
    found, right = run(block, x, grad, "triton"), run(exact, x.double(), grad, "torch")
    for ours, theirs in zip(found, right, strict=True):
        assert_accurate(ours, theirs)
    for p, q in zip(block.parameters(), exact.parameters(), strict=True):
        assert_accurate(p.grad, q.grad)


def test_a_hidden_layer_of_too_many_channels_is_torchs() -> None:
    block = mbconv(1, 3, 1, 16, 16, se_layer=lambda channels, *_, **named: SqueezeExcitation(channels, 1025, **named))
    x = channels_last(2, 16, 5, 5)
    with select.use_backend("triton"), torch.no_grad():
        y = block.cuda().eval()(x)
        assert "1025 channels" in (explain(block, x)[0].reason or "")
    with select.use_backend("torch"), torch.no_grad():
        assert_accurate(y, block(x).double())


def test_second_derivatives() -> None:
    block = randomize(BLOCKS["expand"][0]()).cuda()
    found = []
    for backend in ("triton", "torch"):
        own, x = copy.deepcopy(block), torch.linspace(-1, 1, 2240).sin().reshape(4, 16, 5, 7).cuda().requires_grad_()
        with select.use_backend(backend):
            (g,) = torch.autograd.grad(own(x).square().sum(), x, create_graph=True)
            g.square().sum().backward()
        found.append([g, x.grad, *(p.grad for p in own.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert relative_rms(ours, theirs) < 1e-3


def test_a_single_value_a_channel_is_refused() -> None:
    block = mbconv(6, 3, 2, 16, 24).cuda()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(channels_last(1, 16, 2, 2))


def test_public_functions_give_the_modules_gradients() -> None:
    """depthwise_conv_bn_silu, squeeze_excite and torch's projection against the block's own chain of kernels."""
    block = randomize(mbconv(1, 3, 1, 24, 24)).cuda()
    depthwise, excitation, project = block.block
    x = channels_last(2, 24, 9, 7)
    grad = torch.randn(2, 24, 9, 7, device="cuda")
    y, grad_x = run(block, x, grad, "triton")
    expected = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    x = x.requires_grad_()
    norm = depthwise.norm
    u = ops.depthwise_conv_bn_silu(
        x, depthwise.conv.weight, norm.weight, norm.bias, None, None, 1, 1, True, norm.momentum, norm.eps
    )
    fc1, fc2 = excitation.fc1, excitation.fc2
    gated = ops.squeeze_excite(u, fc1.weight, fc1.bias, fc2.weight, fc2.bias, "silu")
    z = project(gated) + x
    z.backward(grad)
    assert_accurate(z.detach(), y.double())
    assert_accurate(x.grad, grad_x.double())
    for p, q in zip(block.parameters(), expected, strict=True):
        assert_accurate(p.grad, q.double())


def test_pooling_head() -> None:
    """The head pools without storing its map, at inference and in training."""
    head = randomize(ConvBnAct(40, 96, 1, 1, 1, BatchNorm)).cuda()
    for training in (False, True):
        head.train(training)
        exact = copy.deepcopy(head).double()
        x = channels_last(3, 40, 7, 7)
        ours, theirs = x.clone().requires_grad_(training), x.double().requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = head.pooled(ours)
        with select.use_backend("torch"):
            z = exact(theirs).mean(dim=(2, 3))
        assert_accurate(y.detach(), z.detach())
        if training:
            grad = torch.randn_like(y)
            y.backward(grad)
            z.backward(grad.double())
            assert_accurate(ours.grad, theirs.grad)
            for p, q in zip(head.parameters(), exact.parameters(), strict=True):
                assert_accurate(p.grad, q.grad)


def test_explain_names_the_kernels() -> None:
    from effnet_kernels import explain

    model = EfficientNet(
        [FusedMBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(6, 3, 2, 8, 16, 1)], 0.0, num_classes=4
    ).cuda()
    rows = explain(model, channels_last(1, 3, 32, 32))
    reasons = {row.name: (row.backend, row.reason) for row in rows}
    assert reasons["features.1.0"] == ("triton", "the dense convolution by torch, the rest by fused Triton kernels")
    assert reasons["features.2.0"] == ("triton", "fused Triton kernels")
    assert reasons["features.3"] == ("triton", "fused Triton kernels")
