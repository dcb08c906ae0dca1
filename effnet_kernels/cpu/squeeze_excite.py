"""Squeeze-and-excitation on the CPU (Hu et al. 2018, section 3): sums over pixels, and the gate.

The excitation is a handful of products of small matrices, which torch computes in microseconds.
"""

import torch
from torch import Tensor

from effnet_kernels.cpu.extension import extension
from effnet_kernels.cpu.memory import empty, execution, folded, map_address, prologue_addresses
from effnet_kernels.deferred import Activation, Prologue
from effnet_kernels.reference.deferred import activate


def squeeze(x: Tensor, prologue: Prologue, factor: Tensor | None = None) -> Tensor:
    """Partial sums over pixels of the deferred activation, times ``factor`` [N, C, H, W]: [N, T, C]."""
    samples, channels, height, width = x.shape
    cut = extension().cut_pixels(samples, height * width, True)
    sums = empty(samples, cut[3], channels)
    prologue = folded(prologue)
    extension().squeeze(
        cut,
        channels,
        map_address("x", x),
        prologue_addresses(prologue, samples, channels),
        map_address("factor", factor),
        sums.data_ptr(),
        *execution(),
    )
    return sums


def mean_of_sums(sums: Tensor, count: int) -> Tensor:
    """Partial sums over ``count`` pixels to their mean: [N, T, C] to [N, C]."""
    return _total(sums).mul_(1.0 / count)


def excite(
    sums: Tensor, count: int, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """From partial sums over ``count`` pixels [N, T, C] to the gate [N, C], and what backward needs: pooled [N, C] and
    the hidden layer [N, S] before its activation. w1 [S, C], w2 [C, S], b1 [S], b2 [C].
    """
    pooled = mean_of_sums(sums, count)
    hidden = torch.nn.functional.linear(pooled, w1.flatten(1), b1)
    gate = torch.nn.functional.linear(activate(hidden, act), w2.flatten(1), b2).sigmoid_()
    return gate, pooled, hidden


def excite_backward(
    sums: Tensor, count: int, gate: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The squeeze-and-excitation path backwards, on vectors.

    ``sums`` [N, T, 5, C] are those of ``pointwise_conv_backward``, T1 to T5, or [N, T, 1, C] the first alone, which is
    the gate's gradient. Returns offset [N, C], what each pixel's activation gets by way of the mean over ``count``
    pixels; the gradients of the gate's logits [N, C] and of the hidden layer [N, S]; and, from five sums, those that
    the BatchNorm before needs, [N, 2, C]: gate * T2 + offset * T3 and gate * T4 + offset * T5.
    """
    total = _total(sums)
    logits = total[:, 0] * gate * (1.0 - gate)
    dhidden = _through(logits @ w2.flatten(1), hidden, act)
    offset = (dhidden @ w1.flatten(1)).mul_(1.0 / count)
    if sums.shape[2] == 1:
        return offset, logits, dhidden, None
    norm_sums = gate[:, None] * total[:, 1:4:2] + offset[:, None] * total[:, 2:5:2]
    return offset, logits, dhidden, norm_sums


def excite_backward_weight(
    logits: Tensor, dhidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1 [S, C], b1 [S], w2 [C, S] and b2 [C], from those of the logits and the hidden layer."""
    return dhidden.T @ pooled, dhidden.sum(dim=0), logits.T @ activate(hidden, act), logits.sum(dim=0)


def _total(sums: Tensor) -> Tensor:
    return sums.sum(dim=1)


def _through(grad: Tensor, z: Tensor, act: Activation) -> Tensor:
    aten = torch.ops.aten
    if act == "silu":
        return aten.silu_backward(grad, z)
    if act == "relu":
        return aten.threshold_backward(grad, z, 0)
    if act == "relu6":
        return aten.hardtanh_backward(grad, z, 0, 6)
    return aten.hardswish_backward(grad, z) if act == "hardswish" else grad
