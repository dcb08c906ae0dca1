"""Depthwise convolution with a prologue on the CPU, forward and backward."""

from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    ACTIVATION_INDEX,
    address,
    empty,
    empty_map,
    execution,
    folded,
    gradient_addresses,
    map_address,
    prologue_addresses,
    with_both,
    written,
)
from effnet_kernels.fusion.geometry import output_map
from effnet_kernels.fusion.spec import REDUCTIONS, Epilogue, OutputGradient, Padding, Prologue, Reduction

_KERNEL_SIZES = (3, 5, 7)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    prologue: Prologue,
    epilogue: Epilogue,
    reduction: Reduction,
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [C, 1, k, k] to y [N, C, H', W'], k 3, 5 or 7.

    The second is partial (count, mean, M2) of the stored values [P, 3, C] with "statistics", or sums of them over each
    image's pixels [N, 1, C] with "pool". The padding is of zeros after the prologue, which has no gate here; the
    epilogue has no residual.
    """
    samples, channels, height, width = x.shape
    kernel = _kernel_size(weight)
    left, _, top, _ = padding
    out_height, out_width = output_map(height, width, kernel, stride, padding)
    if prologue.gate is not None or epilogue.residual is not None:
        raise ValueError("expected a prologue without a gate and an epilogue without a residual")
    scale, shift, act, _, _ = folded(Prologue(epilogue.scale, epilogue.shift, epilogue.act, None, epilogue.statistics))
    y = empty_map(samples, channels, out_height, out_width)
    partials = None
    if reduction == "statistics":
        partials = empty(extension().depthwise_shards(samples), 3, channels)
    elif reduction == "pool":
        partials = empty(samples, 1, channels)
    # The names hold the tensors that are made here until the call returns: it takes addresses alone.
    prologue = folded(prologue)
    extension().depthwise_forward(
        (samples, channels, height, width, out_height, out_width, kernel, stride, left, top),
        map_address("x", x, samples, channels, height, width),
        address("weight", weight, channels, 1, kernel, kernel),
        prologue_addresses(prologue, samples, channels),
        (address("scale", scale, channels), address("shift", shift, channels), 0, ACTIVATION_INDEX[act]),
        REDUCTIONS.index(reduction),
        written(y),
        written(partials),
        *execution(),
    )
    return y, partials


def depthwise_conv_backward(
    gradient: OutputGradient,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    prologue: Prologue,
    mean: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of ``scale * x + shift`` (of x, plus ``residual``, where the prologue is empty) and of the weight.

    dz [N, C, H, W], with ``mean`` [C] partial sums [P, 2, C] of dz and dz * (x - mean), and dweight [C, 1, k, k].
    """
    samples, channels, height, width = x.shape
    kernel = _kernel_size(weight)
    left, _, top, _ = padding
    out_height, out_width = output_map(height, width, kernel, stride, padding)
    if prologue.gate is not None:
        raise ValueError("expected a prologue without a gate")
    dz = empty_map(samples, channels, height, width)
    sums = None if mean is None else empty(extension().depthwise_shards(samples), 2, channels)
    dweight = empty(channels, 1, kernel, kernel)
    # The names hold the tensors that are made here until the call returns: it takes addresses alone.
    prologue, gradient = folded(prologue), with_both(gradient)
    extension().depthwise_backward(
        (samples, channels, height, width, out_height, out_width, kernel, stride, left, top),
        gradient_addresses(gradient, samples, channels, out_height, out_width),
        map_address("x", x, samples, channels, height, width),
        address("weight", weight, channels, 1, kernel, kernel),
        prologue_addresses(prologue, samples, channels),
        address("mean", mean, channels),
        map_address("residual", residual, samples, channels, height, width),
        written(dz),
        written(sums),
        written(dweight),
        *execution(),
    )
    return dz, sums, dweight


def _kernel_size(weight: Tensor) -> int:
    if weight.shape[-1] not in _KERNEL_SIZES:
        raise ValueError(f"weight: expected a kernel size out of {_KERNEL_SIZES}, got {weight.shape[-1]}")
    return weight.shape[-1]
