"""Every native operator, forward and backward, on every instruction set that this machine can run, against float64."""

import itertools

import pytest
import torch
from conftest import run_python
from gpu.compare import assert_accurate, compare, finalize_and_move, moments
from native_cases import kernel_isas, needs_linux, needs_native, pools_memory, running
from torch import Tensor

from effnet_kernels.backends import cpu
from effnet_kernels.backends.cpu import primitives
from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.fusion.spec import ACTIVATIONS, Epilogue, OutputGradient, Prologue, RunningStatistics

pytestmark = needs_native

ISAS = kernel_isas()
# Below, at and above the 16 columns of a panel and the 8 that half of one has.
CHANNELS = (1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 96)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def vector(*shape: int) -> Tensor:
    return torch.randn(*shape)


def prologue_of(samples: int, channels: int, act: str = "silu", gated: bool = True) -> Prologue:
    gate = torch.rand(samples, channels) if gated else None
    return Prologue(vector(channels).abs() + 0.5, vector(channels), act, gate)


def gradients(grad: Tensor, y: Tensor) -> dict[str, OutputGradient]:
    """What a project, an expand and a pooling head get in training, and all parts at once."""
    samples, channels = y.shape[:2]
    coefficients, drop_path_scale = vector(3, channels), torch.rand(samples)
    offset, gate = vector(samples, channels), torch.rand(samples, channels)
    scale, shift = vector(channels).abs(), vector(channels)
    return {
        "project": OutputGradient(grad, y, coefficients, drop_path_scale=drop_path_scale),
        "expand": OutputGradient(grad, y, coefficients),
        "head": OutputGradient(None, y, coefficients, offset=offset, scale=scale, shift=shift, act="silu"),
        "all": OutputGradient(grad, y, coefficients, gate, drop_path_scale, offset, scale, shift, "hardswish"),
    }


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    torch.manual_seed(0)
    with running(request.param, 1):
        yield request.param


# One row to several blocks of them; one image and several.
POINTWISE = [
    (samples, inputs, outputs, size)
    for (inputs, outputs), (samples, size) in itertools.product(
        [*zip(CHANNELS, reversed(CHANNELS), strict=True), (112, 24), (200, 16)],
        [(1, (1, 2)), (3, (5, 7)), (1, (17, 23))],
    )
]


@pytest.mark.parametrize(("samples", "inputs", "outputs", "size"), POINTWISE)
def test_pointwise_conv(samples, inputs, outputs, size):
    x, weight = channels_last(samples, inputs, *size), vector(outputs, inputs, 1, 1) / inputs**0.5
    for prologue in (Prologue(), prologue_of(samples, inputs)):
        arguments = (x, weight, vector(outputs), prologue, Epilogue(), "statistics")
        y, partials = primitives.pointwise_conv(*arguments)
        compare(y, lambda *a: reference.pointwise_conv(*a)[0], *arguments)
        # Statistics are those of the values as they were stored.
        assert_accurate(primitives.merge_statistics(partials), moments(y))
    statistics = RunningStatistics(vector(outputs), vector(outputs).abs() + 0.5, 1e-3)
    epilogue = Epilogue(vector(outputs), vector(outputs), "silu", channels_last(samples, outputs, *size), statistics)
    arguments = (x, weight, None, Prologue(gate=torch.rand(samples, inputs)), epilogue, "none")
    compare(primitives.pointwise_conv(*arguments), reference.pointwise_conv, *arguments)
    arguments = (x, weight, vector(outputs), Prologue(), epilogue._replace(residual=None), "pool")
    y, sums = primitives.pointwise_conv(*arguments)
    compare((y, sums.sum(dim=1, keepdim=True)), reference.pointwise_conv, *arguments)


@pytest.mark.parametrize("kind", ["project", "expand", "head", "all"])
@pytest.mark.parametrize(("samples", "inputs", "outputs", "size"), POINTWISE[::4])
def test_pointwise_conv_backward(samples, inputs, outputs, size, kind):
    grad, y = channels_last(samples, outputs, *size), channels_last(samples, outputs, *size)
    x, weight = channels_last(samples, inputs, *size), vector(outputs, inputs, 1, 1) / outputs**0.5
    gradient, mean = gradients(grad, y)[kind], vector(inputs)
    prologue, residual = prologue_of(samples, inputs), channels_last(samples, inputs, *size)
    prologue, mean, residual, apply_act_grad = {
        "project": (prologue, mean, None, False),
        "expand": (Prologue(), None, residual, False),
        "head": (Prologue(), None, None, False),
        "all": (prologue, mean, residual, True),
    }[kind]
    dx, sums, dweight = primitives.pointwise_conv_backward(
        gradient, weight, x, prologue, mean, residual, apply_act_grad, True, True
    )
    sums = None if sums is None else sums.sum(dim=1, keepdim=True)
    arguments = (gradient, weight, x, prologue, mean, residual, apply_act_grad, True, True)
    compare((dx, sums, dweight), reference.pointwise_conv_backward, *arguments)
    for needs_input, needs_weight in ((True, False), (False, True)):
        alone = primitives.pointwise_conv_backward(
            gradient, weight, x, prologue, mean, residual, apply_act_grad, needs_input, needs_weight
        )
        if needs_input:
            assert torch.equal(alone[0], dx)
            assert alone[2] is None
        else:
            assert alone[:2] == (None, None)
            assert torch.equal(alone[2], dweight)


@pytest.mark.parametrize("part", ["scale", "shift", "statistics"])
def test_prologues_of_one_part(part):
    """What stands for the missing part lives as long as the call."""
    statistics = RunningStatistics(vector(4096), vector(4096).abs() + 0.5, 1e-3)
    given = {"scale": vector(4096), "shift": vector(4096), "statistics": statistics}
    prologue = Prologue(**{part: given[part]}, act="relu")
    x, weight, taps = channels_last(2, 4096, 3, 3), vector(16, 4096, 1, 1), vector(4096, 1, 3, 3)
    arguments = (x, weight, None, prologue, Epilogue(), "none")
    compare(primitives.pointwise_conv(*arguments), reference.pointwise_conv, *arguments)
    gradient = OutputGradient(channels_last(2, 16, 3, 3))
    arguments = (gradient, weight, x, prologue, None, None, False, False, True)
    compare(primitives.pointwise_conv_backward(*arguments), reference.pointwise_conv_backward, *arguments)
    arguments = (x, taps, 1, (1, 1, 1, 1), prologue, Epilogue(), "none")
    compare(primitives.depthwise_conv(*arguments), reference.depthwise_conv, *arguments)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_their_derivatives(act):
    x, weight = channels_last(3, 24, 5, 7) * 3, vector(40, 24, 1, 1)
    prologue, gradient = prologue_of(3, 24, act), OutputGradient(channels_last(3, 40, 5, 7))
    arguments = (x, weight, None, prologue, Epilogue(None, vector(40), act), "none")
    compare(primitives.pointwise_conv(*arguments), reference.pointwise_conv, *arguments)
    arguments = (gradient, weight, x, prologue, vector(24), None, True, True, False)
    dx, sums, _ = primitives.pointwise_conv_backward(*arguments)
    compare((dx, sums.sum(dim=1, keepdim=True), None), reference.pointwise_conv_backward, *arguments)


# Widths of one to three tiles with remainders, maps smaller than the kernel, both strides and one that has no tiles.
DEPTHWISE = [
    (samples, channels, (height, width), kernel, stride, pads)
    for channels, (samples, height, width), (kernel, pads), stride in itertools.product(
        (8, 17, 40),
        [(1, 1, 1), (3, 5, 4), (1, 6, 11), (2, 9, 19)],
        [(3, (1, 1, 1, 1)), (3, (0, 1, 0, 1)), (5, (2, 2, 2, 2)), (5, (1, 2, 2, 1)), (7, (3, 3, 3, 3))],
        (1, 2, 3),
    )
    if height + pads[2] + pads[3] >= kernel and width + pads[0] + pads[1] >= kernel
]


@pytest.mark.parametrize(("samples", "channels", "size", "kernel", "stride", "pads"), DEPTHWISE)
def test_depthwise_conv(samples, channels, size, kernel, stride, pads):
    x, weight = channels_last(samples, channels, *size), vector(channels, 1, kernel, kernel) / kernel
    prologue = prologue_of(samples, channels, gated=False)
    arguments = (x, weight, stride, pads, prologue, Epilogue(), "statistics")
    y, partials = primitives.depthwise_conv(*arguments)
    compare(y, lambda *a: reference.depthwise_conv(*a)[0], *arguments)
    assert_accurate(primitives.merge_statistics(partials), moments(y))
    grad, gate, offset = channels_last(*y.shape), torch.rand(samples, channels), vector(samples, channels)
    gradient = OutputGradient(
        grad, y, vector(3, channels), gate, None, offset, vector(channels).abs(), vector(channels), "silu"
    )
    for arguments in (
        (gradient, x, weight, stride, pads, prologue, vector(channels), None),
        # As in a block that does not expand: the residual's gradient is added to the input's.
        (OutputGradient(grad, y), x, weight, stride, pads, Prologue(), None, channels_last(*x.shape)),
    ):
        dz, sums, dweight = primitives.depthwise_conv_backward(*arguments)
        sums = None if sums is None else sums.sum(dim=0, keepdim=True)
        compare((dz, sums, dweight), reference.depthwise_conv_backward, *arguments)


@pytest.mark.parametrize("channels", CHANNELS)
def test_depthwise_channels(channels):
    x, weight = channels_last(2, channels, 6, 9), vector(channels, 1, 3, 3)
    prologue = prologue_of(2, channels, gated=False)
    y, partials = primitives.depthwise_conv(x, weight, 2, (1, 1, 1, 1), prologue, Epilogue(), "statistics")
    assert_accurate(primitives.merge_statistics(partials), moments(y))
    arguments = (
        OutputGradient(channels_last(*y.shape), y),
        x,
        weight,
        2,
        (1, 1, 1, 1),
        prologue,
        vector(channels),
        None,
    )
    dz, sums, dweight = primitives.depthwise_conv_backward(*arguments)
    compare((dz, sums.sum(dim=0, keepdim=True), dweight), reference.depthwise_conv_backward, *arguments)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("samples", "size"), [(1, (1, 2)), (3, (5, 7)), (2, (17, 23))])
def test_passes_over_maps(channels, samples, size):
    x, other, residual = (channels_last(samples, channels, *size) for _ in range(3))
    prologue, drop_path_scale = prologue_of(samples, channels), vector(samples)
    assert_accurate(primitives.merge_statistics(primitives.channel_statistics(x * 0.1 + 3)), moments(x * 0.1 + 3))
    for applied, factor in ((prologue, None), (Prologue(), other)):
        compare(
            primitives.squeeze(x, applied, factor).sum(dim=1, keepdim=True),
            reference.squeeze,
            x,
            applied,
            factor,
        )
    for arguments in (
        (x, prologue, other, drop_path_scale),
        (x, prologue._replace(gate=None), None, None),
        (x, Prologue(), other, drop_path_scale),
    ):
        compare(primitives.bn_act_add(*arguments), reference.bn_act_add, *arguments)
    for gradient in (
        *gradients(other, x).values(),
        OutputGradient(other, x, act="relu6", scale=vector(channels), shift=vector(channels)),
        OutputGradient(other, x),
    ):
        mean = vector(channels)
        compare(
            primitives.gradient_sums(gradient, mean).sum(dim=0, keepdim=True), reference.gradient_sums, gradient, mean
        )
        arguments = (gradient._replace(coefficients=vector(3, channels)), residual)
        compare(primitives.apply_gradient(*arguments), reference.apply_gradient, *arguments)


def test_statistics_of_a_large_mean_keep_their_digits():
    """E[x^2] - E[x]^2 in float32 would have none left at a mean of a thousand deviations."""
    x = channels_last(3, 24, 15, 17)
    bias, weight = torch.full((40,), 1000.0), vector(40, 24, 1, 1) / 5
    for y, partials in (
        primitives.pointwise_conv(x, weight, bias, Prologue(), Epilogue(), "statistics"),
        primitives.depthwise_conv(
            x + 1000, vector(24, 1, 3, 3).abs(), 1, (0, 0, 0, 0), Prologue(), Epilogue(), "statistics"
        ),
    ):
        _, mean, m2 = primitives.merge_statistics(partials)
        right = moments(y)
        # The means of partials, rounded at 1000, are subtracted from one another.
        assert ((mean - right[1]).abs() <= 1e-6 * right[1]).all()
        assert ((m2 - right[2]).abs() <= 1e-4 * right[2]).all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [16, 7, 1152])
def test_finalize_batch_norm(channels, affine):
    x = channels_last(3, channels, 5, 7)
    partials = torch.stack([moments(x[:2]), moments(x[2:]), torch.zeros(3, channels)]).float()
    weight, bias = (vector(channels), vector(channels)) if affine else (None, None)
    mean, var = vector(channels), vector(channels).abs()
    arguments = (partials, weight, bias, mean.clone(), var.clone(), 0.3, 1e-3, False)
    folded = primitives.finalize_batch_norm(partials, weight, bias, mean, var, 0.3, 1e-3, False)
    compare((folded, mean, var), finalize_and_move, *arguments)
    sums, rstd = vector(7, 2, channels), vector(channels).abs()
    for batch_statistics in (True, False):
        actual = primitives.finalize_batch_norm_backward(sums, 35, weight, mean, rstd, batch_statistics)
        compare(actual, reference.finalize_batch_norm_backward, sums, 35, weight, mean, rstd, batch_statistics)


def test_fold_of_nonfinite_statistics():
    partials = moments(channels_last(3, 8, 5, 7))[None].float()
    partials[0, 1, 2], partials[0, 2, 5] = float("nan"), float("inf")
    kept = torch.tensor([c in (2, 5) for c in range(8)])
    for skip in (True, False):
        mean, var = torch.zeros(8), torch.ones(8)
        primitives.finalize_batch_norm(partials, None, None, mean, var, 0.1, 1e-3, skip)
        assert torch.isfinite(mean[~kept]).all()
        assert torch.equal(mean == 0, kept) if skip else not torch.isfinite(var).all()


# Images, channels and hidden units below, at and above a panel of 16, a pair of panels and a block of 48 rows.
@pytest.mark.parametrize(
    ("samples", "channels", "squeezed", "act", "kind"),
    [
        (3, 32, 8, "silu", "sigmoid"),
        (1, 40, 300, "relu", "hardsigmoid"),
        (16, 7, 1, "hardswish", "sigmoid"),
        (17, 113, 33, "silu", "sigmoid"),
        (33, 48, 16, "relu6", "hardsigmoid"),
        (101, 20, 49, "none", "sigmoid"),
    ],
)
def test_excite(samples, channels, squeezed, act, kind):
    sums = vector(samples, 2, channels)
    w1, b1 = vector(squeezed, channels, 1, 1) / channels**0.5, vector(squeezed)
    w2, b2 = vector(channels, squeezed, 1, 1) / squeezed**0.5, 3 * vector(channels)
    actual = gate, pooled, hidden = primitives.excite(sums, 5, w1, b1, w2, b2, act, kind)
    compare(actual, reference.excite, sums, 5, w1, b1, w2, b2, act, kind)
    for kinds in (5, 1):
        t = vector(samples, 3, kinds, channels)
        actual = primitives.excite_backward(t, 5, gate, hidden, w1, w2, act, kind)
        compare(actual, reference.excite_backward, t, 5, gate, hidden, w1, w2, act, kind)
    arguments = (actual[1], actual[2], hidden, pooled, act)
    compare(primitives.excite_backward_weight(*arguments), reference.excite_backward_weight, *arguments)


def everything(samples: int, channels: int, outputs: int, height: int, width: int) -> list[Tensor]:
    """The results of every operator on one shape, from one seed."""
    torch.manual_seed(1)
    x, y = channels_last(samples, channels, height, width), channels_last(samples, outputs, height, width)
    weight, prologue = vector(outputs, channels, 1, 1), prologue_of(samples, channels)
    gradient = gradients(channels_last(*y.shape), y)["all"]
    ungated, taps = prologue._replace(gate=None), vector(channels, 1, 5, 5)
    depthwise = primitives.depthwise_conv(x, taps, 2, (2, 2, 2, 2), ungated, Epilogue(), "statistics")
    of_depthwise = OutputGradient(channels_last(*depthwise[0].shape), depthwise[0])
    sums = primitives.squeeze(x, prologue)
    w1, w2 = vector(12, channels, 1, 1), vector(channels, 12, 1, 1)
    gate, pooled, hidden = primitives.excite(sums, 5, w1, None, w2, None, "silu", "sigmoid")
    path = primitives.excite_backward(sums[:, :, None], 5, gate, hidden, w1, w2, "silu", "sigmoid")
    results = (
        *primitives.pointwise_conv(x, weight, None, prologue, Epilogue(), "statistics"),
        *primitives.pointwise_conv(x, weight, None, Prologue(), Epilogue(act="silu"), "pool"),
        *primitives.pointwise_conv_backward(gradient, weight, x, prologue, vector(channels), None, True, True, True),
        *depthwise,
        *primitives.depthwise_conv_backward(of_depthwise, x, taps, 2, (2, 2, 2, 2), ungated, vector(channels), None),
        primitives.channel_statistics(x),
        primitives.bn_act_add(x, prologue, x, torch.rand(samples)),
        primitives.gradient_sums(gradient, vector(outputs)),
        primitives.apply_gradient(gradient, None),
        *(sums, gate, pooled, hidden, *path),
        *primitives.excite_backward_weight(path[1], path[2], hidden, pooled, "silu"),
    )
    return [result for result in results if result is not None]


@pytest.mark.parametrize("shape", [(3, 40, 24, 33, 29), (1, 96, 17, 14, 14), (17, 240, 64, 7, 7)])
def test_threads_change_no_bit(shape, isa):
    alone = everything(*shape)
    assert all(torch.isfinite(result).all() for result in alone)
    for threads in (2, 3, 7):
        with running(isa, threads):
            assert all(torch.equal(a, b) for a, b in zip(alone, everything(*shape), strict=True))


GUARDED = """
import torch
from native_cases import guarded, kernel_isas, running
import test_native_operators as tests
from effnet_kernels.backends.cpu import batch_norm, depthwise, bn_act_add, pointwise, squeeze_excite

def clone(tensor, at_end):
    copy = guarded(tensor.numel(), at_end).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)

for isa in kernel_isas():
    for at_end in (True, False):
        make = lambda *shape: guarded(torch.Size(shape).numel(), at_end).view(shape).fill_(float("nan"))
        tests.vector = lambda *shape: make(*shape).normal_()
        tests.channels_last = lambda n, c, h, w: make(n, h, w, c).normal_().permute(0, 3, 1, 2)
        torch.rand = lambda *shape: make(*shape).uniform_()
        for module in (batch_norm, depthwise, bn_act_add, pointwise, squeeze_excite):
            module.empty = make
            module.empty_map = lambda n, c, h, w: make(n, h, w, c).permute(0, 3, 1, 2)
        for shape in ((2, 1, 7, 3, 5), (1, 9, 24, 8, 9), (3, 40, 17, 9, 23)):
            with running(isa, 1):
                assert all(torch.isfinite(result).all() for result in tests.everything(*shape)), (isa, shape)
print("done")
"""


@needs_linux
def test_touches_nothing_outside_its_tensors(isa):
    if isa != ISAS[0]:
        # The process goes through all of them.
        return
    done = run_python(GUARDED)
    assert done.stdout.strip() == "done", done.stderr or f"died with status {done.returncode}"


@pools_memory
def test_memory_of_maps_is_used_again():
    from effnet_kernels.backends.cpu.memory import empty_map

    first = empty_map(2, 64, 56, 56)
    address = first.data_ptr()
    view = first[1]
    del first
    # Still in use.
    other = empty_map(2, 64, 56, 56)
    assert other.data_ptr() != address
    del view
    assert empty_map(2, 64, 56, 56).data_ptr() == address
    cpu.release_memory()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: primitives.bn_act_add(x.double(), Prologue(), None, None), "x: expected a float32.*float64"),
        (
            lambda x, w: primitives.bn_act_add(x.contiguous(), Prologue(), None, None),
            "x: expected .*channels-last strides",
        ),
        (lambda x, w: primitives.bn_act_add(x, prologue_of(1, 9), None, None), r"scale: expected shape \(8,\)"),
        (
            lambda x, w: primitives.depthwise_conv(x, w, 1, (1,) * 4, Prologue(), Epilogue(), "none"),
            "kernel size out of",
        ),
        (
            lambda x, w: primitives.pointwise_conv(x, w, None, Prologue(), Epilogue(), "none"),
            r"weight: expected shape \(8, 8, 1, 1\)",
        ),
    ],
)
def test_what_would_be_misread_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(channels_last(1, 8, 6, 6), torch.randn(8, 1, 4, 4))
