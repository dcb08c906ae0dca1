"""Every depthwise kernel that this machine can run, against torch in float64."""

import itertools
import math

import pytest
import torch
from conftest import run_python
from native_cases import (
    ACTIVATIONS,
    expected_depthwise,
    kernel_isas,
    make_epilogue,
    needs_linux,
    needs_native,
    raw_depthwise,
    relative_rms,
)

from effnet_kernels import cpu
from effnet_kernels.deferred import Epilogue

pytestmark = needs_native

TOLERANCE = 1e-5
ISAS = kernel_isas()
# Below, at and above the 1, 4, 8 and 16 lanes of the kernels, and several vectors with a remainder.
CHANNELS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 96)
SAME = {3: (1, 1, 1, 1), 5: (2, 2, 2, 2), 7: (3, 3, 3, 3)}


pytestmark = pytest.mark.usefixtures("one_thread")


def check(isa, n, c, h, w, k, stride, padding, epilogue, threads=1):
    x = torch.randn(n, c, h, w).to(memory_format=torch.channels_last)
    weight = torch.randn(c, 1, k, k) / k
    y, pooled = raw_depthwise(x, weight, stride, padding, epilogue, isa, threads)
    expected = expected_depthwise(x, weight, stride, padding, epilogue)
    assert relative_rms(y, expected) < TOLERANCE
    assert relative_rms(pooled, expected.mean((2, 3))) < TOLERANCE


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
    y, _ = raw_depthwise(x, weight, 1, SAME[3], Epilogue(act=act), isa)
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
    torch.testing.assert_close(identity(x, act, isa), ACTIVATIONS[act](x), equal_nan=True, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_channel(isa):
    x = torch.randn(1, 17, 9, 9).to(memory_format=torch.channels_last)
    x[0, 16, 4, 4] = math.nan
    y, pooled = raw_depthwise(x, torch.randn(17, 1, 3, 3), 1, SAME[3], make_epilogue(17, "relu6"), isa)
    assert y[0, 16, 3:6, 3:6].isnan().all()
    assert y.isnan().sum() == 9
    assert pooled.isnan().sum() == 1


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    torch.manual_seed(0)
    for n, c, size, k, stride in ((1, 1152, 7, 5, 1), (3, 40, 33, 3, 2), (1, 33, 57, 3, 1), (2, 137, 14, 7, 1)):
        x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last)
        weight, epilogue = torch.randn(c, 1, k, k), make_epilogue(c, "silu")
        y, pooled = raw_depthwise(x, weight, stride, SAME[k], epilogue, isa, threads=1)
        assert not y.isnan().any()
        for threads in (2, 3, 7):
            again = raw_depthwise(x, weight, stride, SAME[k], epilogue, isa, threads)
            assert torch.equal(y, again[0])
            assert torch.equal(pooled, again[1])


GUARDED = """
import torch
from native_cases import *

torch.set_num_threads(1)

def nhwc(n, c, h, w, at_end):
    return guarded(n * c * h * w, at_end).view(n, h, w, c).permute(0, 3, 1, 2)

for isa in kernel_isas():
    for at_end in (True, False):
        sizes = ((1, 1), (5, 9), (8, 23))
        for c, (h, w), k, stride in itertools.product((1, 3, 8, 9, 17, 40), sizes, (3, 5, 7), (1, 2)):
            p = (k // 2,) * 4
            x, weight = nhwc(2, c, h, w, at_end), guarded(c * k * k, at_end).view(c, 1, k, k)
            scale, shift = guarded(c, at_end).uniform_(), guarded(c, at_end).normal_()
            x.normal_(), weight.normal_()
            ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
            y, pooled = nhwc(2, c, ho, wo, at_end), guarded(2 * c, at_end).view(2, c)
            epilogue = Epilogue(scale, shift, "silu")
            raw_depthwise(x, weight, stride, p, epilogue, isa, 1, y, pooled)
            expected = expected_depthwise(x, weight, stride, p, epilogue)
            assert relative_rms(y, expected) < 1e-5, (isa, c, h, w, k, stride)
print("done")
"""


@needs_linux
def test_touches_nothing_outside_its_tensors():
    done = run_python("import itertools\n" + GUARDED)
    assert done.stdout.strip() == "done", done.stderr or f"died with status {done.returncode}"


def test_public_call():
    torch.manual_seed(0)
    x = torch.randn(2, 24, 15, 17).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 1, 3, 3).transpose(2, 3)
    epilogue = make_epilogue(24, "hardswish")
    y, pooled = cpu.depthwise_conv(x, weight, 2, (0, 1, 0, 1), epilogue, pool=True)
    expected = expected_depthwise(x, weight, 2, (0, 1, 0, 1), epilogue)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_rms(y, expected) < TOLERANCE
    assert pooled is not None
    assert relative_rms(pooled, expected.mean((2, 3))) < TOLERANCE
    y, pooled = cpu.depthwise_conv(x, weight, 1, (1, 1, 1, 1), None, pool=False)
    assert pooled is None
    assert relative_rms(y, expected_depthwise(x, weight, 1, (1, 1, 1, 1), None)) < TOLERANCE


def test_empty():
    y, pooled = cpu.depthwise_conv(
        torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(8, 1, 3, 3),
        2,
        (1, 1, 1, 1),
        None,
        True,
    )
    assert y.shape == (0, 8, 3, 3)
    assert pooled is not None
    assert pooled.shape == (0, 8)
    x = torch.randn(2, 8, 2, 2).to(memory_format=torch.channels_last)
    assert cpu.depthwise_conv(x, torch.randn(8, 1, 7, 7), 1, (0, 0, 0, 0))[0].shape == (2, 8, 0, 0)


X = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
W = torch.randn(8, 1, 3, 3)
P = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), W, 1, P), "x: expected a float32.*float64"),
        ((X, W.half(), 1, P), "weight: expected a float32.*float16"),
        ((X.contiguous(), W, 1, P), "x: expected .*channels-last strides, got shape"),
        ((X[0], W, 1, P), "x: expected .*got shape"),
        ((X[:, :, :, ::2], W, 1, P), "x: expected .*channels-last"),
        ((X.to("meta"), W, 1, P), "x: expected .*CPU, got .*meta"),
        ((X, W[:7], 1, P), r"weight: expected \(8, 1, k, k\).*got \(7, 1, 3, 3\)"),
        ((X, torch.randn(8, 1, 4, 4), 1, P), r"weight: .*got \(8, 1, 4, 4\)"),
        ((X, torch.randn(8, 1, 3, 5), 1, P), r"weight: .*got \(8, 1, 3, 5\)"),
        ((X, W, 0, P), "stride: expected at least 1, got 0"),
        ((X, W, 1, (1, -1, 1, 1)), "padding: .*-1"),
        ((X, W, 1, P, Epilogue(scale=torch.ones(7))), r"epilogue.scale: expected .*8 elements, got shape \(7,\)"),
        ((X, W, 1, P, Epilogue(shift=torch.ones(16)[::2])), "epilogue.shift: expected a contiguous.*strides"),
        ((X, W, 1, P, Epilogue(shift=torch.ones(8).double())), "epilogue.shift: expected a float32"),
        ((X, W, 1, P, Epilogue(residual=X)), "epilogue.residual: expected None"),
        ((X, W, 1, P, Epilogue(act="gelu")), "epilogue.act: expected one of .*got 'gelu'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cpu.depthwise_conv(*arguments)
