"""A chain's backward pass on a backend's primitives, which know no autograd.

``docs/design.md`` derives it: BatchNorm's two sums and three coefficients, and squeeze-and-excitation's five sums. The
residual's gradient is added inside the first convolution's data gradient, where the autograd engine would add full
maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from effnet_kernels.backends.base import Primitives
from effnet_kernels.backends.dense import conv_backward
from effnet_kernels.backends.operands import as_contiguous, as_map, in_memory, like_parameter
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion.forward import Gating, Saved, contiguous, padding_for, unflatten
from effnet_kernels.fusion.spec import (
    PARAMETERS_OF_A_LAYER,
    SUMS_OF_NORM,
    Chain,
    Excitation,
    Layer,
    OutputGradient,
    Prologue,
    accumulation_dtype,
)
from effnet_kernels.fusion.synchronisation import add_up, group_of


class Norm(NamedTuple):
    """BatchNorm of one forward pass, [K] each, fp32."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


class NormGradient(NamedTuple):
    """The gradient at a layer's BatchNorm, from which that of its raw output follows.

    Attributes:
        gradient: of the raw output, still without BatchNorm's coefficients.
        sums: partial sums over pixels of dz and of dz * (y - mean), [P, 2, K], which the coefficients are made of.
    """

    gradient: OutputGradient
    sums: Tensor


def backward(
    primitives: Primitives,
    chain: Chain,
    parameters: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    drop_path_scale: Tensor | None,
    saved: Sequence[Tensor],
    needs_input: bool,
    needs_parameters: Sequence[bool],
    plans: Plans | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of ``x`` and those of the parameters, where they are needed.

    ``parameters`` take the places of the chain's, and ``saved`` are the tensors that :func:`.forward.forward` returned.
    All of them and ``grad`` may come in other strides than they left in: hooks on saved tensors change them. ``plans``
    are the chain's, on the Triton backend.
    """
    if chain.pool:
        # Each pixel's share of the gradient of the mean.
        grad = grad.to(accumulation_dtype(grad.dtype)) / (saved[-2].shape[2] * saved[-2].shape[3])
    first = chain.layers[0]
    # A plan has launches of kernels alone, and a dense convolution is torch's.
    apart = plans is not None and first.kind == "dense"

    def compute() -> list[Tensor | None]:
        made = chain.with_parameters([None if t is None else in_memory(t) for t in parameters])
        tensors = unflatten(chain, saved)
        return _backward(primitives, made, grad, x, drop_path_scale, tensors, needs_input, needs_parameters, apart)

    if plans is None:
        results = compute()
    else:
        settings = "backward", chain.pool, needs_input, tuple(needs_parameters)
        results = plans.run(settings, [grad, x, drop_path_scale, *saved, *parameters], compute)
    grad_x, *gradients = results
    if apart and grad_x is not None:
        dy, x, weight = grad_x, as_map(x), parameters[0]
        assert weight is not None
        residual = as_map(grad) if chain.residual else None
        padding = padding_for(first, x)
        grad_x, made = conv_backward(
            dy, x, in_memory(weight), first.stride, padding, residual, needs_input, needs_parameters[0]
        )
        gradients[0] = None if made is None else like_parameter(made, weight)
    return grad_x, gradients


def _backward(
    primitives: Primitives,
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    drop_path_scale: Tensor | None,
    saved: Sequence[Saved],
    needs_input: bool,
    needs_parameters: Sequence[bool],
    apart: bool,
) -> list[Tensor | None]:
    """The passes of :func:`backward`: the gradient of ``x``, then those of the parameters.

    ``grad`` is that of the output, or with ``chain.pool`` of each of its pixels. With ``apart`` the first convolution's
    gradients are left to the caller, who gets that of its raw output in place of that of ``x``.
    """
    given, chain = chain, contiguous(chain)
    grad = as_contiguous(grad) if chain.pool else as_map(grad)
    x, drop_path_scale = as_map(x), None if drop_path_scale is None else as_contiguous(drop_path_scale)
    saved = [
        Saved(as_map(y), as_contiguous(norm), None if gating is None else _contiguous_gating(gating))
        for y, norm, gating in saved
    ]
    norms = [Norm(*layer.norm[:4].unbind()) for layer in saved]
    own: list[tuple[Tensor | None, ...]] = [()] * len(chain.layers)
    of_excitations: list[tuple[Tensor | None, ...]] = [(None,) * 4] * len(chain.layers)
    grad_input: Tensor | None = None
    at_norm = _at_the_end(primitives, chain, grad, drop_path_scale, saved[-1].y, norms[-1])
    for index in reversed(range(len(chain.layers))):
        layer = chain.layers[index]
        needs_weight, needs_bias = needs_parameters[index * PARAMETERS_OF_A_LAYER :][:2]
        coefficients, norm_weight, norm_bias = _finalize(primitives, layer, at_norm.sums, saved[index])
        bias = None
        if layer.bias is not None and needs_bias:
            # The batch's mean takes a constant out again.
            bias = coefficients[0] * norm_bias * (0.0 if layer.batch_statistics else 1.0)
        gradient = at_norm.gradient._replace(coefficients=coefficients)
        if index == 0 and apart:
            weight = None
            if needs_input or needs_weight:
                grad_input = primitives.apply_gradient(gradient, None)
        elif index == 0:
            residual = grad if chain.residual else None
            grad_input, weight = _first(primitives, layer, gradient, x, residual, needs_input, needs_weight)
        elif layer.kind == "depthwise":
            at_norm, weight = _depthwise(
                primitives, layer, gradient, chain.layers[index - 1], saved[index - 1].y, norms[index - 1]
            )
        else:
            at_norm, weight, of_excitations[index - 1] = _pointwise(
                primitives, layer, gradient, chain.layers[index - 1], saved[index - 1], norms[index - 1], needs_weight
            )
        own[index] = weight, bias, norm_weight, norm_bias
    gradients = [g for pair in zip(own, of_excitations, strict=True) for row in pair for g in row]
    return [grad_input] + [
        None if g is None or p is None or not needed else like_parameter(g, p)
        for g, p, needed in zip(gradients, given.parameters(), needs_parameters, strict=True)
    ]


def _finalize(primitives: Primitives, layer: Layer, sums: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's coefficients, and the gradients of its weight and bias, from partial sums [P, 2, K].

    Where it is synchronised, the coefficients are those of all processes, and the gradients this process's part, which
    is added to the others' as those of other parameters are.
    """
    assert layer.norm is not None
    _, _, mean, rstd, *counts = saved.norm.unbind()
    finalize = primitives.finalize_batch_norm_backward
    if not counts:
        y = saved.y
        count = y.shape[0] * y.shape[2] * y.shape[3]
        return finalize(sums, count, layer.norm.weight, mean, rstd, layer.batch_statistics)
    group = group_of(layer.norm)
    if group is None:
        raise RuntimeError("expected the processes that the forward pass was synchronised with, got none")
    own = sums.sum(0)
    coefficients, _, _ = finalize((add_up(own, group) / counts[0])[None], 1, layer.norm.weight, mean, rstd, True)
    return coefficients, rstd * own[1], own[0]


def _at_the_end(
    primitives: Primitives, chain: Chain, grad: Tensor, drop_path_scale: Tensor | None, y: Tensor, norm: Norm
) -> NormGradient:
    """At the last layer, of the raw output ``y``."""
    act = chain.layers[-1].act
    gradient = OutputGradient(grad, y, drop_path_scale=drop_path_scale, scale=norm.scale, shift=norm.shift, act=act)
    if chain.pool:
        gradient = gradient._replace(grad=None, offset=grad)
    return NormGradient(gradient, primitives.gradient_sums(gradient, norm.mean))


def _first(
    primitives: Primitives,
    layer: Layer,
    gradient: OutputGradient,
    x: Tensor,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the chain's input, to which ``residual`` is added, and of its first convolution's weight."""
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    if layer.kind == "pointwise":
        grad_x, _, grad_weight = primitives.pointwise_conv_backward(
            gradient, layer.weight, x, Prologue(), None, residual, False, needs_input, needs_weight
        )
    elif layer.kind == "depthwise":
        if needs_input or needs_weight:
            grad_x, _, grad_weight = primitives.depthwise_conv_backward(
                gradient, x, layer.weight, layer.stride, padding_for(layer, x), Prologue(), None, residual
            )
    else:
        grad_x, grad_weight = primitives.dense_conv_backward(
            gradient, x, layer.weight, layer.stride, padding_for(layer, x), residual, needs_input, needs_weight
        )
    return grad_x if needs_input else None, grad_weight


def _depthwise(
    primitives: Primitives, layer: Layer, gradient: OutputGradient, before: Layer, x: Tensor, norm: Norm
) -> tuple[NormGradient, Tensor]:
    """What the layer before a depthwise one gets, and the depthwise weight's gradient.

    ``x`` and ``norm`` are the raw output and the BatchNorm of the layer before.
    """
    assert before.excitation is None
    prologue = Prologue(norm.scale, norm.shift, before.act)
    dz, sums, weight = primitives.depthwise_conv_backward(
        gradient, x, layer.weight, layer.stride, padding_for(layer, x), prologue, norm.mean, None
    )
    assert sums is not None
    return NormGradient(OutputGradient(dz, x), sums), weight


def _pointwise(
    primitives: Primitives,
    layer: Layer,
    gradient: OutputGradient,
    before: Layer,
    saved: Saved,
    norm: Norm,
    needs_weight: bool,
) -> tuple[NormGradient, Tensor | None, tuple[Tensor | None, ...]]:
    """What the layer before a pointwise one gets, the pointwise weight's gradient, and those of the excitation between.

    ``saved`` and ``norm`` are what the forward pass made of the layer before.
    """
    gate = None if saved.gating is None else saved.gating.gate
    prologue = Prologue(norm.scale, norm.shift, before.act, gate)
    apply_act_grad = before.excitation is None
    dx, sums, weight = primitives.pointwise_conv_backward(
        gradient, layer.weight, saved.y, prologue, norm.mean, None, apply_act_grad, True, needs_weight
    )
    assert dx is not None
    assert sums is not None
    if before.excitation is None:
        # They are sums of dz and of dz * (y - mean).
        return NormGradient(OutputGradient(dx, saved.y), sums[:, :, SUMS_OF_NORM].flatten(0, 1)), weight, (None,) * 4
    at_norm, of_excitation = _excite(primitives, before, before.excitation, saved, norm, dx, sums)
    return at_norm, weight, of_excitation


def _excite(
    primitives: Primitives,
    layer: Layer,
    excitation: Excitation,
    saved: Saved,
    norm: Norm,
    dq: Tensor,
    pixel_sums: Tensor,
) -> tuple[NormGradient, tuple[Tensor | None, ...]]:
    """What a layer with squeeze-and-excitation behind it gets, and the gradients of the excitation's parameters.

    ``dq`` is the gradient of the gated output, and ``pixel_sums`` [N, T, 5, K] its :class:`.PixelSums`, or the first
    three of them where the forward pass has made the slopes'.
    """
    assert saved.gating is not None
    gate, pooled, hidden, slopes = saved.gating
    count = saved.y.shape[2] * saved.y.shape[3]
    w1, _, w2, _, act, gate_kind = excitation
    offset, grad_logits, grad_hidden, sums = primitives.excite_backward(
        pixel_sums, count, gate, hidden, w1, w2, act, gate_kind, slopes
    )
    assert sums is not None
    gradient = OutputGradient(dq, saved.y, None, gate, None, offset, norm.scale, norm.shift, layer.act)
    of_excitation = primitives.excite_backward_weight(grad_logits, grad_hidden, hidden, pooled, act)
    return NormGradient(gradient, sums), of_excitation


def _contiguous_gating(gating: Gating) -> Gating:
    gate, pooled, hidden, slopes = gating
    made = None if slopes is None else as_contiguous(slopes)
    return Gating(as_contiguous(gate), as_contiguous(pooled), as_contiguous(hidden), made)
