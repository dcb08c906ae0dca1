"""The primitives in plain PyTorch: the protocol, finite differences, autograd of the forward ones, and BatchNorm."""

import inspect
import itertools
import typing

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch import Tensor

from effnet_kernels import ops
from effnet_kernels.backends.base import Primitives, PrimitivesBackend
from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import ACTIVATIONS, GATES, Epilogue, OutputGradient, PixelSums, Prologue

pytestmark = pytest.mark.usefixtures("one_thread")
N, C, K, S, H, W = 2, 2, 3, 2, 4, 3
PRIMITIVES = [name for name, member in vars(Primitives).items() if inspect.isfunction(member) and name[0] != "_"]


@pytest.mark.parametrize("backend", typing.get_args(PrimitivesBackend))
@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_backend_has_the_protocols_signatures(name, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="the launchers import their kernels")
    primitives = primitives_of(backend)
    expected = inspect.signature(getattr(Primitives, name))
    arguments = [p for p in expected.parameters.values() if p.name != "self"]
    assert inspect.signature(getattr(primitives, name)) == expected.replace(parameters=arguments)
    assert name in primitives.__all__


def test_no_backend_has_a_primitive_of_its_own():
    assert sorted(PRIMITIVES) == sorted(reference.__all__)
    for backend in ("cpu", "reference"):
        assert sorted(primitives_of(backend).__all__) == sorted(PRIMITIVES)


def rand(*shape: int) -> Tensor:
    """Float64 leaf away from zero, where relu has no derivative."""
    x = torch.rand(shape, dtype=torch.float64) + 0.2
    return (x * (torch.randint(0, 2, shape) * 2 - 1)).requires_grad_()


def gradcheck(function, *inputs: Tensor) -> None:
    # Finite differences in steps of 1e-6 have errors of this size themselves.
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def present(*results: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t for t in results if t is not None)


# Forward: differentiable, with the derivatives that finite differences have


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
def test_pointwise_conv_gradients(act, reduction):
    def function(x, weight, bias, scale, shift, gate, scale_out, shift_out, residual):
        prologue, epilogue = Prologue(scale, shift, act, gate), Epilogue(scale_out, shift_out, act, residual)
        return present(*reference.pointwise_conv(x, weight, bias, prologue, epilogue, reduction))

    gradcheck(
        function, rand(N, C, H, W), rand(K, C, 1, 1), rand(K), rand(C), rand(C), rand(N, C), rand(K), rand(K),
        rand(N, K, H, W),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
def test_depthwise_conv_gradients(kernel, stride, reduction):
    padding = (kernel // 2 - 1, kernel // 2, kernel // 2, kernel // 2)
    plain = (stride, padding, Prologue(), Epilogue(), "none")
    shape = reference.depthwise_conv(rand(N, C, H, W), rand(C, 1, kernel, kernel), *plain)[0].shape

    def function(x, weight, scale, shift, gate, scale_out, shift_out, residual):
        prologue, epilogue = Prologue(scale, shift, "silu", gate), Epilogue(scale_out, shift_out, "silu", residual)
        return present(*reference.depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction))

    gradcheck(
        function, rand(N, C, H, W), rand(C, 1, kernel, kernel), rand(C), rand(C), rand(N, C), rand(C), rand(C),
        rand(*shape),
    )  # fmt: skip


def test_dense_conv_gradients():
    def function(x, weight, bias):
        return reference.dense_conv(x, weight, bias, 2, (0, 1, 1, 2), "statistics")

    gradcheck(function, rand(N, C, H, W), rand(K, C, 3, 3), rand(K))


def test_finalize_batch_norm_gradients():
    def function(y, z, weight, bias):
        partials = torch.cat([reference.channel_statistics(y), reference.channel_statistics(z)])
        return reference.finalize_batch_norm(partials, weight, bias, None, None, 0.1, 1e-3, False)

    gradcheck(function, rand(N, C, H, W), rand(1, C, H, W), rand(C), rand(C))
    mean, var = rand(C), rand(C).detach().abs().requires_grad_()
    gradcheck(lambda w, b, m, v: ops.finalize_batch_norm(None, w, b, m, v, 0.1, 1e-3), rand(C), rand(C), mean, var)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_squeeze_excite_merge_gradients(act):
    gradcheck(
        lambda x, s, t, g, f: reference.squeeze(x, Prologue(s, t, act, g), f),
        rand(N, C, H, W), rand(C), rand(C), rand(N, C), rand(N, C, H, W),
    )  # fmt: skip
    for gate in GATES:
        weights = rand(S, C, 1, 1), rand(S), rand(C, S, 1, 1), rand(C)
        gradcheck(lambda *a, gate=gate: reference.excite(a[0], 3, *a[1:], act, gate)[0], rand(N, 2, C), *weights)
    gradcheck(
        lambda x, s, t, g, r, k: reference.bn_act_add(x, Prologue(s, t, act, g), r, k),
        rand(N, C, H, W), rand(C), rand(C), rand(N, C), rand(N, C, H, W), rand(N),
    )  # fmt: skip


# Backward: what autograd makes of the forward primitives


def output_gradient(y: Tensor, act: str) -> tuple[OutputGradient, Tensor]:
    """A gradient of a raw output with all of its parts, and dy by its definition, with autograd's act'."""
    channels = y.shape[1]
    grad, gate, drop_path_scale, offset = rand(*y.shape), rand(N, channels), rand(N), rand(N, channels)
    scale, shift, coefficients = rand(channels), rand(channels), rand(3, channels)
    gradient = OutputGradient(
        *(t.detach() for t in (grad, y, coefficients, gate, drop_path_scale, offset, scale, shift)), act
    )
    leaf = y.detach().requires_grad_()
    plain = (lambda z: z) if act == "none" else getattr(F, act)
    z = scale.detach().view(-1, 1, 1) * leaf + shift.detach().view(-1, 1, 1)
    at_activation = grad * gate[:, :, None, None] * drop_path_scale.view(-1, 1, 1, 1) + offset[:, :, None, None]
    (dz,) = torch.autograd.grad(plain(z), z, at_activation.detach())
    alpha, beta, gamma = coefficients.detach()[:, :, None, None]
    return gradient, (alpha * dz + beta * leaf + gamma).detach()


def by_autograd(outputs: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, grad, retain_graph=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_of_raw_outputs(act):
    y, residual, mean = rand(N, C, H, W).detach(), rand(N, C, H, W).detach(), rand(C).detach()
    gradient, dy = output_gradient(y, act)
    assert_close(reference.apply_gradient(gradient, residual), dy + residual)
    bare = gradient._replace(coefficients=None)
    dz = reference.apply_gradient(bare, None)
    total, centred = reference.gradient_sums(bare, mean)[0]
    assert_close(total, dz.sum(dim=(0, 2, 3)))
    assert_close(centred, (dz * (y - mean.view(-1, 1, 1))).sum(dim=(0, 2, 3)))
    without = OutputGradient(None, y, offset=gradient.offset, act="none")
    assert_close(reference.apply_gradient(without, None), gradient.offset[:, :, None, None].expand_as(y))


@pytest.mark.parametrize(
    ("act", "apply_act_grad", "gated"), [*itertools.product(ACTIVATIONS, [False, True], [False, True])]
)
def test_pointwise_conv_backward(act, apply_act_grad, gated):
    x, weight, scale, shift = rand(N, C, H, W), rand(K, C, 1, 1), rand(C), rand(C)
    gate, mean = (rand(N, C) if gated else None), rand(C).detach()
    prologue = Prologue(scale, shift, act, gate)
    y, _ = reference.pointwise_conv(x, weight, None, prologue, Epilogue(), "none")
    gradient, dy = output_gradient(y, "silu")
    bare = Prologue(*(t.detach() if isinstance(t, Tensor) else t for t in prologue))
    dx, sums, dweight = reference.pointwise_conv_backward(
        gradient, weight.detach(), x.detach(), bare, mean, None, apply_act_grad, True, True
    )
    assert_close(dweight, *by_autograd(y, dy, weight))
    # What the convolution read, as a leaf; and each sample's scale, shift and gate, which the five sums are of.
    scales, shifts = (v.detach().expand(N, C).clone().requires_grad_() for v in (scale, shift))
    gates = torch.ones(N, C, dtype=torch.float64).requires_grad_() if gate is None else gate
    z = scales[:, :, None, None] * (x - mean.view(-1, 1, 1)) + (shifts + scales * mean)[:, :, None, None]
    u = reference.bn_act_add(z, Prologue(act=act), None, None)
    gated_u = u * gates[:, :, None, None]
    again = F.conv2d(gated_u, weight)
    dq, dz, dgate, dshift, dscale = by_autograd(again, dy, gated_u, z, gates, shifts, scales)
    slopes = by_autograd(u.sum(), torch.ones((), dtype=torch.float64), shifts, scales)
    of_gate, of_shift, of_scale, *of_slopes = sums[:, 0].unbind(1)
    assert_close(dx, dz if apply_act_grad else dq)
    assert_close(of_gate, dgate)
    # The derivative with respect to scale is of (x - mean) + mean, as z is written here.
    assert_close(gates * of_shift, dshift)
    assert_close(gates * (of_scale + mean * of_shift), dscale)
    assert len(of_slopes) == (0 if apply_act_grad else 2)
    if not apply_act_grad:
        slope, centred_slope = of_slopes
        assert_close(slope, slopes[0])
        assert_close(centred_slope + mean * slope, slopes[1])


def test_pointwise_conv_backward_of_what_is_needed():
    x, weight, residual = rand(N, C, H, W), rand(K, C, 1, 1), rand(N, C, H, W).detach()
    y, _ = reference.pointwise_conv(x, weight, None, Prologue(), Epilogue(), "none")
    gradient, dy = output_gradient(y, "none")
    plain = (gradient, weight.detach(), x.detach(), Prologue(), None, residual, False)
    dx, sums, dweight = reference.pointwise_conv_backward(*plain, True, False)
    assert sums is None
    assert dweight is None
    assert_close(dx, by_autograd(y, dy, x)[0] + residual)
    assert reference.pointwise_conv_backward(*plain, False, True)[:2] == (None, None)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, (1, 1, 1, 1)), (5, 2, (1, 2, 2, 2))])
def test_depthwise_conv_backward(kernel, stride, padding, act):
    x, weight, scale, shift = rand(N, C, H, W), rand(C, 1, kernel, kernel), rand(C), rand(C)
    z = scale.view(-1, 1, 1) * x + shift.view(-1, 1, 1)
    y, _ = reference.depthwise_conv(z, weight, stride, padding, Prologue(act=act), Epilogue(), "none")
    gradient, dy = output_gradient(y, "hardswish")
    prologue, mean, residual = (
        Prologue(scale.detach(), shift.detach(), act),
        rand(C).detach(),
        rand(N, C, H, W).detach(),
    )
    dz, sums, dweight = reference.depthwise_conv_backward(
        gradient, x.detach(), weight.detach(), stride, padding, prologue, mean, residual
    )
    of_z, of_weight = by_autograd(y, dy, z, weight)
    assert_close(dz, of_z + residual)
    assert_close(dweight, of_weight)
    assert_close(sums[0, 0], of_z.sum(dim=(0, 2, 3)))
    assert_close(sums[0, 1], (of_z * (x - mean.view(-1, 1, 1))).sum(dim=(0, 2, 3)))


def test_dense_conv_backward():
    x, weight, residual = rand(N, C, H, W), rand(K, C, 3, 3), rand(N, C, H, W).detach()
    y, _ = reference.dense_conv(x, weight, None, 2, (0, 1, 1, 2), "none")
    gradient, dy = output_gradient(y, "silu")
    plain = (gradient, x.detach(), weight.detach(), 2, (0, 1, 1, 2), residual)
    dx, dweight = reference.dense_conv_backward(*plain, True, True)
    of_x, of_weight = by_autograd(y, dy, x, weight)
    assert_close(dx, of_x + residual)
    assert_close(dweight, of_weight)
    assert reference.dense_conv_backward(*plain, False, False) == (None, None)


@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_finalize_batch_norm_backward(affine, batch_statistics):
    """dy = alpha * dz + beta * y + gamma is autograd's gradient of BatchNorm's input."""
    y, dz = rand(N, C, H, W), rand(N, C, H, W).detach()
    weight, bias = (rand(C), rand(C)) if affine else (None, None)
    statistics = reference.channel_statistics(y if batch_statistics else rand(N, C, H, W).detach())
    scale, shift, mean, rstd = reference.finalize_batch_norm(statistics, weight, bias, None, None, 0.1, 1e-3, False)
    z = reference.bn_act_add(y, Prologue(scale, shift), None, None)
    detached = None if weight is None else weight.detach()
    mean, rstd = mean.detach(), rstd.detach()
    sums = reference.gradient_sums(OutputGradient(dz, y.detach()), mean)
    # Halves, as a kernel's partials are.
    partials = torch.cat([sums * 0.25, sums * 0.75])
    count = N * H * W
    coefficients, dweight, dbias = reference.finalize_batch_norm_backward(
        partials, count, detached, mean, rstd, batch_statistics
    )
    dy = reference.apply_gradient(OutputGradient(dz, y.detach(), coefficients), None)
    assert_close(dy, *by_autograd(z, dz, y))
    if affine:
        assert_close(dweight, by_autograd(z, dz, weight)[0])
        assert_close(dbias, by_autograd(z, dz, bias)[0])


@pytest.mark.parametrize(("act", "gate"), [*itertools.product(ACTIVATIONS, GATES)])
def test_excite_backward(act, gate):
    sums, w1, b1, w2, b2 = rand(N, 2, C), rand(S, C, 1, 1), rand(S), rand(C, S, 1, 1), rand(C)
    # torch's derivative of the hard sigmoid has a sixth in float32.
    tolerance = 1e-7 if gate == "hardsigmoid" else None
    value, pooled, hidden = reference.excite(sums, 3, w1, b1, w2, b2, act, gate)
    five = rand(N, 3, 5, C).detach()
    given = [t.detach() for t in (value, hidden, w1, w2)]
    offset, logits, dhidden, norm_sums = reference.excite_backward(five, 3, *given, act, gate)
    dgate = five[:, :, 0].sum(dim=1)
    of_sums, of_hidden, *of_weights = by_autograd(value, dgate, sums, hidden, w1, b1, w2, b2)
    assert_close(offset, of_sums[:, 0], tolerance)
    assert_close(dhidden, of_hidden, tolerance)
    weights = reference.excite_backward_weight(logits, dhidden, hidden.detach(), pooled.detach(), act)
    for ours, right in zip(weights, of_weights, strict=True):
        assert_close(ours.reshape(right.shape), right, tolerance)
    total = PixelSums(*five.sum(dim=1).unbind(1))
    assert_close(norm_sums[:, 0], value.detach() * total.grad_shift + offset * total.slope)
    assert_close(norm_sums[:, 1], value.detach() * total.grad_scale + offset * total.centred_slope)
    alone = reference.excite_backward(five[:, :, :1], 3, *given, act, gate)
    assert alone[3] is None
    assert_close(alone[0], offset)


# BatchNorm and rounding, as torch has them


def test_statistics_are_the_count_mean_and_squared_deviations_even_far_from_zero():
    y = torch.randn(3, C, H, W, dtype=torch.float32) + 1000
    partials = torch.cat([reference.channel_statistics(part) for part in (y[:1], y[1:], y[:0])])
    exact = y.double().transpose(0, 1).flatten(1)
    # Means of partials, rounded at 1000, are subtracted from one another.
    for (count, mean, m2), tolerance in (
        (reference.channel_statistics(y)[0], 1e-5),
        (reference.merge_statistics(partials), 1e-4),
    ):
        assert torch.equal(count, torch.full((C,), 3.0 * H * W))
        assert_close(mean.double(), exact.mean(1), 1e-6)
        assert_close(m2.double(), exact.var(1, unbiased=False) * exact.shape[1], tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_equals_batch_norm_and_moves_the_running_statistics(training, affine):
    norm = torch.nn.BatchNorm2d(C, momentum=0.3, affine=affine).double().train(training)
    x = torch.randn(N, C, H, W, dtype=torch.float64)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    stats = reference.channel_statistics(x)[0] if training else None
    scale, shift = ops.finalize_batch_norm(stats, norm.weight, norm.bias, mean, var, 0.3, norm.eps)
    assert_close(reference.bn_act_add(x, Prologue(scale, shift), None, None), norm(x))
    assert_close(mean, norm.running_mean)
    assert_close(var, norm.running_var)


@pytest.mark.parametrize("skip", [False, True])
def test_running_statistics_of_nonfinite_batches(skip):
    """torch writes them; with the switch, a channel whose statistics are not finite keeps its own."""
    x = torch.randn(N, 4, H, W)
    x[0, 1, 0, 0], x[1, 2, 2, 2] = float("inf"), float("nan")
    norm = torch.nn.BatchNorm2d(4)
    norm(x)
    mean, var = torch.zeros(4), torch.ones(4)
    reference.finalize_batch_norm(reference.channel_statistics(x), None, None, mean, var, 0.1, 1e-5, skip)
    finite = torch.tensor([True, False, False, True])
    for ours, theirs, before in ((mean, norm.running_mean, 0.0), (var, norm.running_var, 1.0)):
        assert_close(ours[finite], theirs[finite])
        if skip:
            assert (ours[~finite] == before).all()
        else:
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_stored_rounded_and_computed_in_float32(dtype):
    x, weight = torch.randn(N, 64, H, W).to(dtype), torch.randn(32, 64, 1, 1).to(dtype)
    y, stats = reference.pointwise_conv(x, weight, None, Prologue(), Epilogue(), "statistics")
    exact = F.conv2d(x.double(), weight.double())
    assert y.dtype == dtype
    assert torch.equal(y, F.conv2d(x.float(), weight.float()).to(dtype))
    # The statistics are those of the stored values, not of the sums before rounding.
    assert stats.dtype == torch.float32
    assert_close(stats[0, 1], y.float().mean(dim=(0, 2, 3)))
    theirs = F.conv2d(x, weight).double()
    assert (y.double() - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_multiply_what_is_rounded_to_the_dtype_of_the_maps(dtype):
    x = torch.randn(N, 64, H, W).to(dtype)
    weight, taps = torch.randn(32, 64, 1, 1), torch.randn(64, 1, 3, 3)
    prologue = Prologue(torch.rand(64) + 0.5, torch.randn(64), "silu", torch.rand(N, 64))
    u = reference.bn_act_add(x, prologue, None, None).float()
    y, _ = reference.pointwise_conv(x, weight, None, prologue, Epilogue(), "none")
    assert torch.equal(y, F.conv2d(u, weight.to(dtype).float()).to(dtype))
    z, _ = reference.depthwise_conv(x, taps, 1, (1, 1, 1, 1), prologue, Epilogue(), "none")
    assert torch.equal(z, F.conv2d(u, taps.to(dtype).float(), padding=1, groups=64).to(dtype))
    dy = torch.randn_like(y)
    _, _, dweight = reference.pointwise_conv_backward(
        OutputGradient(dy), weight, x, prologue, None, None, False, False, True
    )
    assert_close(dweight[:, :, 0, 0], torch.einsum("nkhw,nchw->kc", dy.float(), u))
    assert dweight.dtype == torch.float32


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
