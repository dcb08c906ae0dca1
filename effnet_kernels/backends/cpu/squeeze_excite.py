"""Squeeze-and-excitation on the CPU (Hu et al. 2018, section 3): sums over pixels, and the gate."""

from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    ACTIVATION_INDEX,
    address,
    empty,
    execution,
    folded,
    map_address,
    prologue_addresses,
    written,
)
from effnet_kernels.fusion.spec import GATES, Activation, Gate, Prologue


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
    # torch would convert and broadcast an operand that does not fit.
    address("sums", sums, *sums.shape)
    return sums.sum(dim=1).mul_(1.0 / count)


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
    samples, parts, channels = sums.shape
    squeezed = w1.shape[0]
    gate, pooled, hidden = empty(samples, channels), empty(samples, channels), empty(samples, squeezed)
    extension().excite(
        (samples, channels, squeezed),
        parts,
        count,
        address("sums", sums, samples, parts, channels),
        _matrix_address("w1", w1, squeezed, channels),
        address("b1", b1, squeezed),
        _matrix_address("w2", w2, channels, squeezed),
        address("b2", b2, channels),
        ACTIVATION_INDEX[act],
        GATES.index(kind),
        written(gate),
        written(pooled),
        written(hidden),
        *execution(),
    )
    return gate, pooled, hidden


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
    if sums.dim() != 4 or sums.shape[2] not in (1, 5):
        raise ValueError(f"sums: expected [N, T, 5, C] or [N, T, 1, C], got shape {tuple(sums.shape)}")
    samples, parts, kinds, channels = sums.shape
    squeezed = w1.shape[0]
    offset, grad_logits = empty(samples, channels), empty(samples, channels)
    grad_hidden = empty(samples, squeezed)
    norm_sums = empty(samples, 2, channels) if kinds == 5 else None
    extension().excite_backward(
        (samples, channels, squeezed),
        parts,
        kinds,
        count,
        address("sums", sums, samples, parts, kinds, channels),
        address("gate", gate, samples, channels),
        address("hidden", hidden, samples, squeezed),
        _matrix_address("w1", w1, squeezed, channels),
        _matrix_address("w2", w2, channels, squeezed),
        ACTIVATION_INDEX[act],
        GATES.index(kind),
        written(offset),
        written(grad_logits),
        written(grad_hidden),
        written(norm_sums),
        *execution(),
    )
    return offset, grad_logits, grad_hidden, norm_sums


def excite_backward_weight(
    grad_logits: Tensor, grad_hidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1 [S, C], b1 [S], w2 [C, S] and b2 [C], from those of the logits and the hidden layer."""
    samples, channels = grad_logits.shape
    squeezed = grad_hidden.shape[1]
    dw1, db1, dw2, db2 = empty(squeezed, channels), empty(squeezed), empty(channels, squeezed), empty(channels)
    extension().excite_backward_weight(
        (samples, channels, squeezed),
        address("grad_logits", grad_logits, samples, channels),
        address("grad_hidden", grad_hidden, samples, squeezed),
        address("hidden", hidden, samples, squeezed),
        address("pooled", pooled, samples, channels),
        ACTIVATION_INDEX[act],
        written(dw1),
        written(db1),
        written(dw2),
        written(db2),
        *execution(),
    )
    return dw1, db1, dw2, db2


def _matrix_address(name: str, weight: Tensor, outputs: int, inputs: int) -> int:
    """The address of a layer's weight, [K, C] or [K, C, 1, 1]."""
    return address(name, weight, outputs, inputs, *(1, 1) * (weight.dim() == 4))
