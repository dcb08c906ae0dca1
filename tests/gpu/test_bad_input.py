"""Operators and modules on a device with kernels, with input that does not fit them."""

import pytest
import torch
from conftest import randomize
from torch import nn

from effnet_kernels import EfficientNet, explain, ops
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.configs import Target, use_target
from effnet_kernels.modules import ConvBnAct, MBConvConfig
from gpu.compare import assert_accurate, channels_last


def block() -> nn.Module:
    config = MBConvConfig(2, 3, 1, 16, 16, 1)
    return randomize(config.block(config, 0.0, nn.BatchNorm2d)).eval().cuda()


def test_channels_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \(24, 1, 3, 3\), got \(16, 1, 3, 3\)"):
        ops.depthwise_conv(channels_last(1, 24, 7, 7), torch.randn(16, 1, 3, 3, device="cuda"), padding=1)
    with pytest.raises(ValueError, match=r"expected an input \[N, 16, H, W\], got shape \(1, 24, 7, 7\)"):
        block()(channels_last(1, 24, 7, 7))


def test_dtypes_that_are_no_maps() -> None:
    with pytest.raises(TypeError, match=r"expected float32, float16, bfloat16 or float64, got torch\.int64"):
        ops.squeeze(torch.ones(1, 16, 7, 7, dtype=torch.int64, device="cuda"))


def test_lower_precision_parameters_of_float32_maps_are_the_references() -> None:
    x, weight = channels_last(2, 16, 7, 9), torch.randn(24, 16, 1, 1, device="cuda").half()
    y, _ = ops.pointwise_conv(x, weight)
    assert_accurate(y, nn.functional.conv2d(x.double(), weight.double()))


def test_float64_runs_as_torch_has_it() -> None:
    x = channels_last(1, 16, 7, 7).double()
    module = block().double()
    assert {row.backend for row in explain(module, x)} == {"torch"}
    assert module(x).dtype == torch.float64


def test_an_empty_batch() -> None:
    y = block()(torch.empty(0, 16, 7, 7, device="cuda"))
    assert y.shape == (0, 16, 7, 7)
    y, _ = ops.pointwise_conv(torch.empty(0, 16, 7, 7, device="cuda"), torch.randn(24, 16, 1, 1, device="cuda"))
    assert y.shape == (0, 24, 7, 7)


@pytest.mark.parametrize(("kernel", "stride"), [(9, 1), (3, 3)])
def test_kernel_sizes_that_no_kernel_has(kernel: int, stride: int) -> None:
    x = channels_last(1, 16, 11, 11)
    layer = ConvBnAct(16, 16, kernel, stride, groups=16).eval().cuda()
    (row, *_) = explain(layer, x)
    assert row.backend == "torch"
    assert f"size {kernel} and stride {stride}" in row.reason
    y, _ = ops.depthwise_conv(x, layer[0].weight, stride, kernel // 2)
    expected = nn.functional.conv2d(x.double(), layer[0].weight.double(), None, stride, kernel // 2, groups=16)
    assert_accurate(y.detach(), expected.detach())


def test_wide_squeezes_that_no_kernel_has() -> None:
    pooled = torch.randn(2, 16, device="cuda")
    w1, w2 = torch.randn(1100, 16, device="cuda"), torch.randn(16, 1100, device="cuda")
    expected = torch.sigmoid(nn.functional.silu(pooled.double() @ w1.double().T) @ w2.double().T)
    assert_accurate(ops.excite(pooled, w1, None, w2, None), expected)


@pytest.mark.parametrize("target", [Target("cuda", 75, 40), Target("cuda", 130, 200), Target("hip", "gfx950", 256)])
def test_an_unknown_architecture_gets_a_configuration(target: Target) -> None:
    module, x = block(), channels_last(2, 16, 9, 7)
    with use_target(target), select.use_backend("triton"):
        y = module(x)
    with select.use_backend("torch"):
        assert_accurate(y.detach(), module.double()(x.double()).detach())


def test_a_model_takes_every_memory_format() -> None:
    model = EfficientNet([MBConvConfig(2, 3, 2, 8, 16, 1)], 0.0, num_classes=3).eval().cuda()
    x = torch.randn(2, 3, 20, 22, device="cuda")
    with torch.no_grad(), select.use_backend("triton"):
        expected = model(x)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
        strided = torch.randn(2, 3, 20, 44, device="cuda")[..., ::2]
        strided.copy_(x)
        assert torch.equal(model(strided), expected)
