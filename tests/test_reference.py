"""The operators in reference form: gradients against finite differences, and the formulas they stand for."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import Tensor

from effnet_kernels import ops, reference
from effnet_kernels.deferred import ACTIVATIONS, GATES, Epilogue, Prologue

pytestmark = pytest.mark.usefixtures("one_thread")
N, C, K, S, H, W = 2, 2, 3, 2, 4, 3


def rand(*shape: int) -> Tensor:
    """Float64 leaf away from zero, where relu has no derivative."""
    x = torch.rand(shape, dtype=torch.float64) + 0.2
    return (x * (torch.randint(0, 2, shape) * 2 - 1)).requires_grad_()


def gradcheck(function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
def test_pointwise_conv_gradients(act, reduction):
    def function(x, weight, bias, scale, shift, gate, scale_out, shift_out, residual):
        y, extra = reference.pointwise_conv(
            x, weight, bias, Prologue(scale, shift, act, gate), Epilogue(scale_out, shift_out, act, residual), reduction
        )
        return y if extra is None else (y, extra)

    gradcheck(
        function, rand(N, C, H, W), rand(K, C, 1, 1), rand(K), rand(C), rand(C), rand(N, C), rand(K), rand(K),
        rand(N, K, H, W),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
def test_depthwise_conv_gradients(kernel, stride, reduction):
    padding = (kernel // 2 - 1, kernel // 2, kernel // 2, kernel // 2)
    shape = reference.depthwise_conv(rand(N, C, H, W), rand(C, 1, kernel, kernel), stride, padding)[0].shape

    def function(x, weight, scale, shift, gate, scale_out, shift_out, residual):
        prologue, epilogue = Prologue(scale, shift, "silu", gate), Epilogue(scale_out, shift_out, "silu", residual)
        y, extra = reference.depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction)
        return y if extra is None else (y, extra)

    gradcheck(
        function, rand(N, C, H, W), rand(C, 1, kernel, kernel), rand(C), rand(C), rand(N, C), rand(C), rand(C),
        rand(*shape),
    )  # fmt: skip


def test_fold_batch_norm_gradients():
    def function(y, weight, bias):
        stats = reference.channel_statistics(y)
        return reference.fold_batch_norm(stats, weight, bias, None, None, 0.1, 1e-3)

    gradcheck(function, rand(N, C, H, W), rand(C), rand(C))

    mean, var = rand(C), rand(C).detach().abs().requires_grad_()
    gradcheck(lambda w, b, m, v: reference.fold_batch_norm(None, w, b, m, v, 0.1, 1e-3), rand(C), rand(C), mean, var)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_squeeze_excite_merge_gradients(act):
    gradcheck(
        lambda x, s, t, g: reference.squeeze(x, Prologue(s, t, act, g)), rand(N, C, H, W), rand(C), rand(C), rand(N, C)
    )
    for gate in GATES:
        weights = rand(S, C, 1, 1), rand(S), rand(C, S, 1, 1), rand(C)
        gradcheck(lambda *a, gate=gate: reference.excite(*a, act, gate), rand(N, C), *weights)
    gradcheck(
        lambda x, s, t, g, r, k: reference.merge(x, Prologue(s, t, act, g), r, k),
        rand(N, C, H, W), rand(C), rand(C), rand(N, C), rand(N, C, H, W), rand(N),
    )  # fmt: skip


def test_statistics_are_the_count_mean_and_squared_deviations_even_far_from_zero():
    y = torch.randn(3, C, H, W, dtype=torch.float32) + 1000
    count, mean, m2 = reference.channel_statistics(y)
    exact = y.double().transpose(0, 1).flatten(1)
    assert torch.equal(count, torch.full((C,), 3.0 * H * W))
    assert_close(mean.double(), exact.mean(1), 1e-6)
    assert_close(m2.double(), exact.var(1, unbiased=False) * exact.shape[1], 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_equals_batch_norm_and_moves_the_running_statistics(training, affine):
    norm = torch.nn.BatchNorm2d(C, momentum=0.3, affine=affine).double().train(training)
    x = torch.randn(N, C, H, W, dtype=torch.float64)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    stats = reference.channel_statistics(x) if training else None
    scale, shift = ops.fold_batch_norm(stats, norm.weight, norm.bias, mean, var, 0.3, norm.eps)
    assert_close(reference.merge(x, Prologue(scale, shift)), norm(x))
    assert_close(mean, norm.running_mean)
    assert_close(var, norm.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_stored_rounded_and_computed_in_float32(dtype):
    x, weight = torch.randn(N, 64, H, W).to(dtype), torch.randn(32, 64, 1, 1).to(dtype)
    y, stats = reference.pointwise_conv(x, weight, reduction="statistics")
    exact = F.conv2d(x.double(), weight.double())
    assert y.dtype == dtype
    assert torch.equal(y, F.conv2d(x.float(), weight.float()).to(dtype))
    # The statistics are those of the stored values, not of the sums before rounding.
    assert stats.dtype == torch.float32
    assert_close(stats[1], y.float().mean(dim=(0, 2, 3)))
    theirs = F.conv2d(x, weight).double()
    assert (y.double() - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (9, 6), (1, 5), (16, 33)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_is_tensorflows(size, kernel, stride):
    x = torch.randn(1, C, *size)
    y, _ = ops.depthwise_conv(x, torch.randn(C, 1, kernel, kernel), stride, "same")
    assert y.shape[2:] == tuple(-(-s // stride) for s in size)


def test_same_padding_puts_the_odd_zero_right_and_below():
    x, weight = torch.arange(16.0).reshape(1, 1, 4, 4), torch.randn(1, 1, 3, 3)
    y, _ = ops.depthwise_conv(x, weight, 2, "same")
    assert_close(y, F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2))
