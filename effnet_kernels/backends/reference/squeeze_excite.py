"""Squeeze-and-excitation (Hu et al. 2018, section 3), forward and backward, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.backends.activation import activate, activation_backward, gate_of, gate_slope
from effnet_kernels.backends.reference.operands import apply_prologue
from effnet_kernels.fusion.spec import Activation, Gate, PixelSums, Prologue


def squeeze(x: Tensor, prologue: Prologue, factor: Tensor | None = None) -> Tensor:
    """Sums over pixels of the activation of x, times ``factor`` [N, C, H, W]: [N, C, H, W] to [N, 1, C]."""
    u = apply_prologue(x, prologue)
    return (u if factor is None else u * factor).sum(dim=(2, 3))[:, None]


def squeeze_for_backward(x: Tensor, prologue: Prologue, mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`squeeze`, and the two sums of the activation's slopes of :class:`PixelSums`, [N, T, 2, C].

    They are None where ``pointwise_conv_backward`` makes them, as it does here.
    """
    return squeeze(x, prologue), None


def mean_of_sums(sums: Tensor, count: int) -> Tensor:
    """Partial sums over ``count`` pixels to their mean (equation 2): [N, T, C] to [N, C]."""
    return sums.sum(dim=1) / count


def excite(
    sums: Tensor,
    count: int,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation,
    kind: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """From partial sums over ``count`` pixels [N, T, C] to the gate [N, C] (equation 3), and what backward needs:
    pooled [N, C] and the hidden layer [N, S] before its activation.

    w1 [S, C] or [S, C, 1, 1], w2 [C, S] or [C, S, 1, 1], b1 [S], b2 [C].
    """
    pooled = mean_of_sums(sums, count)
    hidden = _linear(pooled, w1, b1)
    return gate_of(_linear(activate(hidden, act), w2, b2), kind), pooled, hidden


def excite_backward(
    sums: Tensor,
    count: int,
    gate: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    act: Activation,
    kind: Gate,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The squeeze-and-excitation path backwards, on vectors.

    ``sums`` [N, T, 5, C] are the :class:`PixelSums` of ``pointwise_conv_backward``, or the first three of them, beside
    which :func:`squeeze_for_backward` has made the ``slopes``, or [N, T, 1, C] the gate's gradient alone. Returns

    - offset [N, C], the gradient that each pixel's activation gets through the mean over ``count`` pixels;
    - the gradients of the gate's logits [N, C] and of the hidden layer [N, S];
    - from five sums, those for the backward of the BatchNorm before, [N, 2, C]: gate * grad_shift + offset * slope and
      gate * grad_scale + offset * centred_slope.
    """
    total = sums.sum(dim=1).unbind(dim=1)
    if slopes is not None:
        total = *total, *slopes.sum(dim=1).unbind(dim=1)
    grad_logits = total[0] * gate_slope(gate, kind)
    grad_hidden = activation_backward(_linear(grad_logits, w2.flatten(1).t()), hidden, act)
    offset = _linear(grad_hidden, w1.flatten(1).t()) / count
    norm_sums = None
    if len(total) == 5:
        of = PixelSums(*total)
        shift, scale = gate * of.grad_shift + offset * of.slope, gate * of.grad_scale + offset * of.centred_slope
        norm_sums = torch.stack([shift, scale], dim=1)
    return offset, grad_logits, grad_hidden, norm_sums


def excite_backward_weight(
    grad_logits: Tensor, grad_hidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1 [S, C], b1 [S], w2 [C, S] and b2 [C], from those of the logits and the hidden layer."""
    of_first = grad_hidden.t() @ pooled, grad_hidden.sum(dim=0)
    return *of_first, grad_logits.t() @ activate(hidden, act), grad_logits.sum(dim=0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))
