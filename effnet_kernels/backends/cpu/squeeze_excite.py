"""Squeeze-and-excitation on the CPU (Hu et al. 2018, section 3): sums over pixels, and the gate.

The excitation's layers are 1x1 convolutions of maps of one pixel; torch does the rest, which is arithmetic on vectors.
"""

from torch import Tensor

from effnet_kernels.backends.activation import activation_backward, gate_of, gate_slope
from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    address,
    empty,
    execution,
    folded,
    map_address,
    prologue_addresses,
    written,
)
from effnet_kernels.backends.cpu.pointwise import pointwise_conv, pointwise_conv_backward
from effnet_kernels.fusion.spec import (
    SUMS_OF_NORM,
    SUMS_OF_SLOPES,
    Activation,
    Epilogue,
    Gate,
    OutputGradient,
    Prologue,
)


def squeeze(x: Tensor, prologue: Prologue, factor: Tensor | None = None) -> Tensor:
    """Partial sums over pixels of the activation, times ``factor`` [N, C, H, W]: [N, T, C]."""
    samples, channels, height, width = x.shape
    partition = extension().partition_pixels(samples, height * width, True)
    sums = empty(samples, partition[3], channels)
    prologue = folded(prologue)
    extension().pooled_sums(
        partition,
        channels,
        map_address("x", x, samples, channels, height, width),
        prologue_addresses(prologue, samples, channels),
        map_address("factor", factor, samples, channels, height, width),
        written(sums),
        *execution(),
    )
    return sums


def squeeze_for_backward(x: Tensor, prologue: Prologue, mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`squeeze`; the slopes are sums of ``pointwise_conv_backward``."""
    return squeeze(x, prologue), None


def mean_of_sums(sums: Tensor, count: int) -> Tensor:
    """Partial sums over ``count`` pixels to their mean: [N, T, C] to [N, C]."""
    return _total(sums).mul_(1.0 / count)


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
    """From partial sums over ``count`` pixels [N, T, C] to the gate [N, C], and what backward needs: pooled [N, C] and
    the hidden layer [N, S] before its activation. w1 [S, C], w2 [C, S], b1 [S], b2 [C].
    """
    if sums.dim() != 3:
        raise ValueError(f"sums: expected [N, T, C], got shape {tuple(sums.shape)}")
    pooled = mean_of_sums(sums, count)
    hidden = _linear(pooled, w1, b1, "none")
    logits = _linear(hidden, w2, b2, act)
    return gate_of(logits, kind), pooled, hidden


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
    """The squeeze-and-excitation path backwards, on vectors; the reference says what they are.

    From partial sums [N, T, 5, C] or [N, T, 1, C] to the offset [N, C], the gradients of the gate's logits [N, C] and
    of the hidden layer [N, S], and from five sums those of the BatchNorm before, [N, 2, C].
    """
    assert slopes is None
    samples, _, kinds, channels = sums.shape
    address("gate", gate, samples, channels)
    address("hidden", hidden, samples, w1.shape[0])
    total = _total(sums)
    grad_logits = total[:, 0] * gate_slope(gate, kind)
    grad_hidden = activation_backward(_linear_backward(grad_logits, w2), hidden, act)
    offset = _linear_backward(grad_hidden, w1).mul_(1.0 / count)
    if kinds == 1:
        return offset, grad_logits, grad_hidden, None
    norm_sums = gate[:, None] * total[:, SUMS_OF_NORM] + offset[:, None] * total[:, SUMS_OF_SLOPES]
    return offset, grad_logits, grad_hidden, norm_sums


def excite_backward_weight(
    grad_logits: Tensor, grad_hidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1 [S, C], b1 [S], w2 [C, S] and b2 [C], from those of the logits and the hidden layer."""
    dw1, dw2 = _weight_gradient(grad_hidden, pooled, "none"), _weight_gradient(grad_logits, hidden, act)
    return dw1, grad_hidden.sum(dim=0), dw2, grad_logits.sum(dim=0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation) -> Tensor:
    """``weight @ act(x) + bias``: x [N, C], weight [K, C] or [K, C, 1, 1] to [N, K]."""
    y, _ = pointwise_conv(_pixel(x), _matrix(weight), bias, Prologue(act=act), Epilogue(), "none")
    assert y is not None
    return y.flatten(1)


def _linear_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the layer's input [N, C] from that of its output [N, K]."""
    weight = _matrix(weight)
    like = empty(grad.shape[0], weight.shape[1], 1, 1)
    gradient = OutputGradient(_pixel(grad))
    dx, _, _ = pointwise_conv_backward(
        gradient, weight, like, Prologue(), None, None, False, needs_input=True, needs_weight=False
    )
    assert dx is not None
    return dx.flatten(1)


def _weight_gradient(grad: Tensor, x: Tensor, act: Activation) -> Tensor:
    """The weight's gradient [K, C] from that of the output [N, K] and the layer's input ``act(x)`` [N, C]."""
    like = empty(grad.shape[1], x.shape[1], 1, 1)
    gradient = OutputGradient(_pixel(grad))
    _, _, dweight = pointwise_conv_backward(
        gradient, like, _pixel(x), Prologue(act=act), None, None, False, needs_input=False, needs_weight=True
    )
    assert dweight is not None
    return dweight.flatten(1)


def _pixel(x: Tensor) -> Tensor:
    return x.contiguous()[:, :, None, None]


def _matrix(weight: Tensor) -> Tensor:
    if weight.dim() not in (2, 4):
        raise ValueError(f"weight: expected [K, C] or [K, C, 1, 1], got shape {tuple(weight.shape)}")
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _total(sums: Tensor) -> Tensor:
    # torch would convert and broadcast an operand that does not fit.
    address("sums", sums, *sums.shape)
    return sums.sum(dim=1)
