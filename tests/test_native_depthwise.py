"""Every depthwise kernel that this machine can run, against torch in float64."""

import itertools
import math

import pytest
import torch
from gpu.compare import compare
from native_cases import kernel_isas, needs_native, running
from torch import Tensor

from effnet_kernels.backends.activation import activate
from effnet_kernels.backends.cpu.primitives import depthwise_conv
from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.fusion.spec import ACTIVATIONS, Activation, Epilogue, Padding, Prologue

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

ISAS = kernel_isas()
# Below, at and above the 1, 4, 8 and 16 lanes of the kernels, and several vectors with a remainder.
CHANNELS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 96)
SAME = {3: (1, 1, 1, 1), 5: (2, 2, 2, 2), 7: (3, 3, 3, 3)}


def make_epilogue(channels: int, act: Activation) -> Epilogue:
    return Epilogue(torch.rand(channels) + 0.5, torch.randn(channels), act)


def native_depthwise(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    isa: str,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """The primitive's output and its pooled sums [N, 1, C], by one instruction set and so many threads."""
    with running(isa, threads):
        y, sums = depthwise_conv(x, weight, stride, padding, Prologue(), epilogue, "pool")
    assert sums is not None
    return y, sums.sum(dim=1, keepdim=True)


def check(isa, n, c, h, w, k, stride, padding, epilogue, threads=1):
    x = torch.randn(n, c, h, w).to(memory_format=torch.channels_last)
    weight = torch.randn(c, 1, k, k) / k
    actual = native_depthwise(x, weight, stride, padding, epilogue, isa, threads)
    compare(actual, reference.depthwise_conv, x, weight, stride, padding, Prologue(), epilogue, "pool")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(isa, channels):
    torch.manual_seed(channels)
    for k, stride in itertools.product((3, 5, 7), (1, 2)):
        check(isa, 2, channels, 6, 11, k, stride, SAME[k], make_epilogue(channels, "silu"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_widths_and_heights(isa, k, stride):
    torch.manual_seed(k)
    # One pixel, maps smaller than the kernel, every tile width, and rows of several tiles with remainders.
    for size in (*range(1, 20), 28, 33, 57):
        check(isa, 1, 17, size % 9 + 1, size, k, stride, SAME[k], make_epilogue(17, "relu"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("k", "padding"),
    [
        (3, (0, 0, 0, 0)),
        (3, (0, 1, 0, 1)),
        (3, (1, 0, 2, 0)),
        (5, (1, 2, 1, 2)),
        (5, (4, 0, 0, 4)),
        (7, (2, 3, 2, 3)),
        # More padding than kernel: the first and last outputs see no pixel.
        (3, (5, 4, 6, 5)),
    ],
)
def test_padding(isa, stride, k, padding):
    torch.manual_seed(0)
    for width in (7, 8, 15, 16, 21):
        check(isa, 3, 19, 8, width, k, stride, padding, make_epilogue(19, "silu"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogue(isa, act):
    torch.manual_seed(0)
    scale, shift = 3 * torch.rand(40), 2 * torch.randn(40)
    for epilogue in (Epilogue(None, None, act), Epilogue(scale, None, act), Epilogue(None, shift, act)):
        check(isa, 1, 40, 9, 13, 3, 1, SAME[3], epilogue)
    check(isa, 3, 40, 9, 13, 5, 2, SAME[5], Epilogue(scale, shift, act))


def identity(values, act, isa):
    """The activation alone: a convolution whose only tap that sees a pixel is 1."""
    # Neighbours would bring 0 * inf, so every value is an image of its own.
    x = values.view(-1, 1, 1, 1).expand(-1, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(16, 1, 3, 3)
    weight[..., 1, 1] = 1
    y, _ = native_depthwise(x, weight, 1, SAME[3], Epilogue(act=act), isa)
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=0, atol=0, equal_nan=True)
    return y[:, 0].flatten()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_accuracy(isa):
    x = torch.cat([torch.linspace(-20, 20, 20001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)])
    expected = torch.nn.functional.silu(x.double())
    error = (identity(x, "silu", isa).double() - expected).abs() / expected.abs().clamp_min(1e-300)
    assert error[expected != 0].max() < 2e-6
    # Beyond, the result is the input on one side and vanishes on the other.
    far = torch.cat([torch.linspace(20, 200, 500), torch.tensor([1e10, 3e38])])
    assert torch.equal(identity(far, "silu", isa), far)
    negative = identity(-far, "silu", isa)
    assert (negative.double() - torch.nn.functional.silu(-far.double())).abs().max() < 1e-12


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_special_values(isa, act):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 6.0, -3.0, 3.0, 1e38, -1e38])
    torch.testing.assert_close(identity(x, act, isa), activate(x, act), equal_nan=True, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_channel(isa):
    x = torch.randn(1, 17, 9, 9).to(memory_format=torch.channels_last)
    x[0, 16, 4, 4] = math.nan
    y, pooled = native_depthwise(x, torch.randn(17, 1, 3, 3), 1, SAME[3], make_epilogue(17, "relu6"), isa)
    assert y[0, 16, 3:6, 3:6].isnan().all()
    assert y.isnan().sum() == 9
    assert pooled.isnan().sum() == 1


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    torch.manual_seed(0)
    for n, c, size, k, stride in ((1, 1152, 7, 5, 1), (3, 40, 33, 3, 2), (1, 33, 57, 3, 1), (2, 137, 14, 7, 1)):
        x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last)
        weight, epilogue = torch.randn(c, 1, k, k), make_epilogue(c, "silu")
        y, pooled = native_depthwise(x, weight, stride, SAME[k], epilogue, isa, threads=1)
        assert not y.isnan().any()
        for threads in (2, 3, 7):
            again = native_depthwise(x, weight, stride, SAME[k], epilogue, isa, threads)
            assert torch.equal(y, again[0])
            assert torch.equal(pooled, again[1])
