"""``ops.depthwise_conv_bn_silu`` and ``ops.squeeze_excite`` by themselves, against torch's own modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import nn
from torchvision.ops import SqueezeExcitation

from effnet_kernels import ops
from effnet_kernels.fusion.spec import Epilogue, Gate, Prologue, RunningStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).double()
    for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
        tensor.data.uniform_(low, high)
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_depthwise_conv_bn_silu(training: bool, kernel: int, stride: int) -> None:
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    norm = batch_norm(6).train(training)
    eager = copy.deepcopy(norm)
    inputs = (x, weight, norm.weight, norm.bias)
    statistics = (norm.running_mean, norm.running_var)
    y = ops.depthwise_conv_bn_silu(*inputs, *statistics, stride, kernel // 2, training)
    z = F.silu(eager(F.conv2d(x, weight, None, stride, kernel // 2, groups=6)))
    assert_close(y, z)
    assert_close(norm.running_mean, eager.running_mean)
    assert_close(norm.running_var, eager.running_var)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(z, (x, weight, eager.weight, eager.bias), grad)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
        assert_close(ours, theirs)


def test_depthwise_conv_bn_silu_without_affine_or_statistics() -> None:
    x, weight = torch.randn(2, 4, 7, 7), torch.randn(4, 1, 3, 3)
    y = ops.depthwise_conv_bn_silu(x, weight, None, None, None, None, padding=1, training=True, act="relu")
    expected = F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, 1, groups=4), None, None, training=True))
    assert_close(y, expected)


def test_depthwise_conv_bn_silu_at_inference_needs_statistics() -> None:
    with pytest.raises(ValueError, match="running_mean"):
        ops.depthwise_conv_bn_silu(torch.randn(1, 4, 7, 7), torch.randn(4, 1, 3, 3), None, None, None, None)


@pytest.mark.parametrize(("gate", "layer"), [("sigmoid", nn.Sigmoid), ("hardsigmoid", nn.Hardsigmoid)])
def test_squeeze_excite(gate: Gate, layer: type[nn.Module]) -> None:
    module = SqueezeExcitation(12, 4, nn.SiLU, layer).double()
    x = torch.randn(3, 12, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = (module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)
    y, expected = ops.squeeze_excite(x, *parameters, gate=gate), module(x)
    assert_close(y, expected)
    grad = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, (x, *parameters), grad)
    for ours, right in zip(torch.autograd.grad(y, (x, *parameters), grad), theirs, strict=True):
        assert_close(ours, right)


@pytest.mark.parametrize(
    ("w1", "w2", "message"),
    [
        ((4, 11), (12, 4), r"w1: expected shape \(4, 12\), got \(4, 11\)"),
        ((4, 12), (12, 5), r"w2: expected shape \(12, 4\), got \(12, 5\)"),
    ],
)
def test_squeeze_excite_of_shapes_that_do_not_fit(w1, w2, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.squeeze_excite(torch.randn(2, 12, 5, 5), torch.randn(w1), None, torch.randn(w2), None)


def test_running_statistics_may_be_folded_by_the_operator() -> None:
    """``statistics`` beside BatchNorm's weight and bias is what scale and shift made of the four are."""
    norm = batch_norm(6).eval()
    x, weight = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(6, 6, 1, 1, dtype=torch.float64)
    statistics = RunningStatistics(norm.running_mean, norm.running_var, norm.eps)
    pooled = ops.squeeze(x, Prologue(norm.weight, norm.bias, "silu", statistics=statistics))
    assert_close(pooled, F.silu(norm(x)).mean((2, 3)))
    y, _ = ops.pointwise_conv(x, weight, None, None, Epilogue(norm.weight, norm.bias, "relu", statistics=statistics))
    assert_close(y, F.relu(norm(F.conv2d(x, weight))))
    y, _ = ops.pointwise_conv(x, weight, epilogue=Epilogue(statistics=statistics))
    plain = F.batch_norm(F.conv2d(x, weight), norm.running_mean, norm.running_var, eps=norm.eps)
    assert_close(y, plain)
