"""The kernels that stream over maps, and the kernels on vectors: BatchNorm, squeeze-and-excitation, bn_act_add."""

import pytest
import torch
from torch import Tensor

from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.backends.triton import batch_norm, pointwise, squeeze_excite
from effnet_kernels.backends.triton.bn_act_add import bn_act_add
from effnet_kernels.fusion.spec import (
    ACTIVATIONS,
    GATES,
    SUMS_OF_SLOPES,
    OutputGradient,
    Prologue,
    RunningStatistics,
)
from gpu.compare import assert_accurate, channels_last, compare, finalize_and_move, moments

# Samples, channels, height, width, dtype.
MAPS = [
    (3, 24, 15, 17, torch.float32),
    (1, 40, 28, 28, torch.float16),
    (3, 7, 7, 7, torch.bfloat16),
    (1, 112, 4, 112, torch.float32),
]


def vector(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


@pytest.mark.parametrize("shape", MAPS)
def test_statistics(shape) -> None:
    x = channels_last(*shape[:4], dtype=shape[4]) * 0.1 + 3
    assert_accurate(batch_norm.merge_statistics(batch_norm.channel_statistics(x)), moments(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [16, 7, 1152])
def test_fold(channels: int, affine: bool) -> None:
    x = channels_last(3, channels, 5, 7)
    partials = torch.cat(
        [moments(x[:2])[None], moments(x[2:])[None], torch.zeros(1, 3, channels, device="cuda")]
    ).float()
    weight, bias = (vector(channels), vector(channels)) if affine else (None, None)
    mean, var = vector(channels), vector(channels).abs()
    arguments = (partials, weight, bias, mean.clone(), var.clone(), 0.3, 1e-3, False)
    folded = batch_norm.finalize_batch_norm(partials, weight, bias, mean, var, 0.3, 1e-3, False)
    compare((folded, mean, var), finalize_and_move, *arguments)


def test_fold_with_a_count_on_the_device() -> None:
    partials, count = moments(channels_last(3, 8, 5, 7))[None].float(), torch.tensor(4, device="cuda")
    by_count, by_number = [vector(8), vector(8).abs()], []
    by_number = [t.clone() for t in by_count]
    batch_norm.finalize_batch_norm(partials, None, None, *by_count, count, 1e-3, False)
    batch_norm.finalize_batch_norm(partials, None, None, *by_number, 0.25, 1e-3, False)
    assert all(torch.equal(a, b) for a, b in zip(by_count, by_number, strict=True))


@pytest.mark.parametrize("skip", [True, False])
def test_fold_of_an_empty_batch(skip: bool) -> None:
    mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    batch_norm.finalize_batch_norm(torch.zeros(2, 3, 8, device="cuda"), None, None, mean, var, 0.1, 1e-3, skip)
    assert not mean.any()
    assert (var == 1).all()


@pytest.mark.parametrize("skip", [True, False])
def test_fold_of_a_single_value(skip: bool) -> None:
    """Its unbiased variance is not a number, on every backend."""
    partials = torch.tensor([1.0, 3.0, 0.0], device="cuda")[None, :, None].expand(1, 3, 8).contiguous()
    found = []
    for primitives in (batch_norm, reference):
        mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
        primitives.finalize_batch_norm(partials, None, None, mean, var, 0.5, 1e-3, skip)
        found.append(torch.stack([mean, var]))
    assert torch.equal(*(t.nan_to_num(7.0) for t in found))
    assert found[0][1].isnan().all()


@pytest.mark.parametrize("skip", [True, False])
def test_fold_of_nonfinite_statistics(skip: bool) -> None:
    """A channel whose statistics are not finite keeps its running ones; the other channels' move."""
    partials = moments(channels_last(3, 8, 5, 7))[None].float()
    partials[0, 1, 2], partials[0, 2, 5] = float("nan"), float("inf")
    mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    batch_norm.finalize_batch_norm(partials, None, None, mean, var, 0.1, 1e-3, skip)
    kept = torch.tensor([c in (2, 5) for c in range(8)], device="cuda")
    assert torch.equal(mean == 0, kept) if skip else not torch.isfinite(var).all()
    assert torch.isfinite(mean[~kept]).all()


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_fold_backward(batch_statistics: bool) -> None:
    sums, weight, mean, rstd = vector(70, 2, 40), vector(40), vector(40), vector(40).abs()
    actual = batch_norm.finalize_batch_norm_backward(sums, 35, weight, mean, rstd, batch_statistics)
    compare(actual, reference.finalize_batch_norm_backward, sums, 35, weight, mean, rstd, batch_statistics)


@pytest.mark.parametrize("shape", MAPS)
def test_passes_over_gradients(shape) -> None:
    samples, channels, dtype = shape[0], shape[1], shape[4]
    grad, y, residual = (channels_last(*shape[:4], dtype=dtype) for _ in range(3))
    affine = {"scale": vector(channels), "shift": vector(channels)}
    gate, offset, drop_path_scale = vector(samples, channels), vector(samples, channels), vector(samples)
    for gradient in (
        OutputGradient(grad, y, act="silu", **affine),
        OutputGradient(grad, y, gate=gate, offset=offset, drop_path_scale=drop_path_scale, act="relu6", **affine),
        OutputGradient(None, y, offset=offset, act="hardswish", **affine),
        OutputGradient(grad, y),
    ):
        mean = vector(channels)
        sums = batch_norm.gradient_sums(gradient, mean).sum(dim=0, keepdim=True)
        compare(sums, reference.gradient_sums, gradient, mean, dtype=dtype)
        arguments = (gradient._replace(coefficients=vector(3, channels)), residual)
        compare(batch_norm.apply_gradient(*arguments), reference.apply_gradient, *arguments, dtype=dtype)


@pytest.mark.parametrize("shape", MAPS)
def test_squeeze_and_bn_act_add(shape) -> None:
    samples, channels, dtype = shape[0], shape[1], shape[4]
    x, other = channels_last(*shape[:4], dtype=dtype), channels_last(*shape[:4], dtype=dtype)
    gate, drop_path_scale = torch.rand(samples, channels, device="cuda"), vector(samples)
    prologue = Prologue(vector(channels), vector(channels), "silu", gate)
    statistics = RunningStatistics(vector(channels), vector(channels).abs() + 0.5, 1e-3)
    for part, factor in ((prologue, None), (Prologue(), other)):
        sums = squeeze_excite.squeeze(x, part, factor)
        compare(sums.sum(dim=1, keepdim=True), reference.squeeze, x, part, factor, dtype=dtype)
        mean = squeeze_excite.mean_of_sums(sums, 5)
        assert_accurate(mean, sums.double().sum(dim=1) / 5)
    for arguments in (
        (x, prologue, other, drop_path_scale),
        (x, prologue._replace(gate=None), None, None),
        (x, prologue._replace(gate=None, statistics=statistics), other, None),
    ):
        compare(bn_act_add(*arguments), reference.bn_act_add, *arguments, dtype=dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", MAPS)
def test_squeeze_for_backward(shape, act: str) -> None:
    channels, dtype = shape[1], shape[4]
    x, mean = channels_last(*shape[:4], dtype=dtype), vector(channels)
    prologue = Prologue(vector(channels), vector(channels), act)
    sums, slopes = squeeze_excite.squeeze_for_backward(x, prologue, mean)
    compare(sums.sum(dim=1, keepdim=True), reference.squeeze, x, prologue, dtype=dtype)
    # They are two of the sums that the reference's backward makes, whatever the gradient is.
    gradient, weight = OutputGradient(torch.zeros_like(x)), torch.zeros(channels, channels, 1, 1, device=x.device)

    def of_slopes(x: Tensor, prologue: Prologue, mean: Tensor) -> Tensor:
        inputs = (gradient._replace(grad=torch.zeros_like(x)), weight.to(x.dtype), x, prologue, mean, None)
        return reference.pointwise_conv_backward(*inputs, False, True, False)[1][:, :, SUMS_OF_SLOPES]

    compare(slopes.sum(dim=1, keepdim=True), of_slopes, x, prologue, mean, dtype=dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_of_nan_and_infinity(act: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -3.0, 0.0, 6.0], device="cuda")
    y = bn_act_add(values.view(1, 6, 1, 1), Prologue(act=act), None, None).flatten()
    expected = reference.bn_act_add(values.view(1, 6, 1, 1), Prologue(act=act), None, None).flatten()
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("kind", GATES)
def test_gates_of_nan_and_infinity(kind: str) -> None:
    logits = torch.tensor([float("nan"), float("inf"), float("-inf"), -3.0, 3.0], device="cuda")
    sums, w1, w2 = (torch.zeros(*shape, device="cuda") for shape in ((1, 1, 5), (1, 5, 1, 1), (5, 1, 1, 1)))
    arguments = (sums, 1, w1, None, w2, logits, "silu", kind)
    torch.testing.assert_close(squeeze_excite.excite(*arguments)[0], reference.excite(*arguments)[0], equal_nan=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_merge_activations(act: str) -> None:
    x = channels_last(1, 8, 5, 7)
    arguments = (x, Prologue(vector(8), vector(8), act), None, None)
    compare(bn_act_add(*arguments), reference.bn_act_add, *arguments)


# Samples, channels, squeezed: widths of the released networks, and some that are no multiple of anything.
EXCITATIONS = [
    (3, 32, 8, "silu", "sigmoid"),
    (1, 1152, 48, "silu", "sigmoid"),
    (3, 96, 4, "relu", "hardsigmoid"),
    (2, 7, 3, "hardswish", "sigmoid"),
    (1, 40, 300, "silu", "hardsigmoid"),
]


@pytest.mark.parametrize("size", [7, 200, 700])
def test_sums_of_partial_results(size: int) -> None:
    partials = vector(300, size)
    assert_accurate(pointwise.sum_partials(partials), partials.double().sum(dim=0))


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize(("samples", "channels", "squeezed"), [(3, 32, 8), (1, 1152, 48), (2, 7, 3), (1, 40, 300)])
def test_excite_of_many_partial_sums(samples: int, channels: int, squeezed: int) -> None:
    w1, b1 = vector(squeezed, channels, 1, 1) / channels**0.5, vector(squeezed)
    w2, b2 = vector(channels, squeezed, 1, 1) / squeezed**0.5, vector(channels)
    for partials in (1, 75):
        arguments = (vector(samples, partials, channels), 5, w1, b1, w2, b2, "silu", "sigmoid")
        compare(squeeze_excite.excite(*arguments), reference.excite, *arguments)


@pytest.mark.parametrize(("samples", "channels", "squeezed", "act", "kind"), EXCITATIONS)
def test_excite(samples: int, channels: int, squeezed: int, act: str, kind: str) -> None:
    sums = vector(samples, 2, channels)
    w1, b1 = vector(squeezed, channels, 1, 1) / channels**0.5, vector(squeezed)
    w2, b2 = vector(channels, squeezed, 1, 1) / squeezed**0.5, 3 * vector(channels)
    actual = gate, mean, hidden = squeeze_excite.excite(sums, 5, w1, b1, w2, b2, act, kind)
    compare(actual, reference.excite, sums, 5, w1, b1, w2, b2, act, kind)
    without = squeeze_excite.excite(sums, 5, w1, None, w2, None, act, kind)
    compare(without, reference.excite, sums, 5, w1, None, w2, None, act, kind)
    for num_sums, slopes in ((3, vector(samples, 2, 2, channels)), (1, None)):
        sums = vector(samples, 3, num_sums, channels)
        arguments = (sums, 5, gate, hidden, w1, w2, act, kind, slopes)
        actual = squeeze_excite.excite_backward(*arguments)
        compare(actual, reference.excite_backward, *arguments)
    arguments = (actual[1], actual[2], hidden, mean, act)
    actual = squeeze_excite.excite_backward_weight(*arguments)
    compare(actual, reference.excite_backward_weight, *arguments)


def test_activations_over_their_whole_range() -> None:
    """SiLU with its fast division is torch's to 2e-6, also at infinities and for very large and small values."""
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([float("inf"), 0.0, -0.0, 1e-30, -1e30])])
    x = values.reshape(1, 1, 1, -1).to("cuda")
    right = torch.nn.functional.silu(values.double())
    y = bn_act_add(x, Prologue(act="silu"), None, None).flatten().cpu()
    finite = values.abs() < 20
    assert ((y - right).abs()[finite] <= 2e-6 * right.abs()[finite]).all()
    assert torch.equal(y[-5:], torch.nn.functional.silu(values[-5:]))
    assert torch.isnan(
        bn_act_add(torch.full((1, 1, 1, 1), float("nan"), device="cuda"), Prologue(act="silu"), None, None)
    ).all()
