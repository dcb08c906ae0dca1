"""BatchNorm as arithmetic on vectors of channels, and the passes over maps that its statistics need, on the CPU."""

from typing import Any

from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    address,
    empty,
    empty_map,
    execution,
    gradient_addresses,
    map_address,
    strided_address,
    with_both,
    written,
)
from effnet_kernels.fusion.spec import OutputGradient


def channel_statistics(y: Tensor) -> Tensor:
    """Partial (count, mean, M2) of each channel: y [N, C, H, W] to [P, 3, C]."""
    partition, channels = _partition(y, False), y.shape[1]
    partials = empty(partition[2] * partition[3], 3, channels)
    extension().channel_statistics(
        partition,
        channels,
        map_address("y", y, *y.shape),
        written(partials),
        *execution(),
    )
    return partials


def gradient_sums(gradient: OutputGradient, mean: Tensor) -> Tensor:
    """Partial sums over pixels of dz and dz * (y - mean), for BatchNorm's backward: [P, 2, C]."""
    y = gradient.y
    assert y is not None
    samples, channels, height, width = y.shape
    partition = _partition(y, gradient.by_sample())
    sums = empty(partition[2] * partition[3], 2, channels)
    # The names hold the tensors that are made here until the call returns: it takes addresses alone.
    gradient = with_both(gradient)
    extension().gradient_sums(
        partition,
        channels,
        gradient_addresses(gradient, samples, channels, height, width),
        address("mean", mean, channels),
        written(sums),
        *execution(),
    )
    return sums


def apply_gradient(gradient: OutputGradient, residual: Tensor | None) -> Tensor:
    """dy of ``gradient`` as a map [N, C, H, W], plus ``residual``: for a convolution that torch computes."""
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    samples, channels, height, width = like.shape
    out = empty_map(samples, channels, height, width)
    gradient = with_both(gradient)
    extension().apply_gradient(
        _partition(like, gradient.by_sample()),
        channels,
        gradient_addresses(gradient, samples, channels, height, width),
        map_address("residual", residual, samples, channels, height, width),
        written(out),
        *execution(),
    )
    return out


def merge_statistics(partials: Tensor) -> Tensor:
    """Count, mean and M2 of the union of partials: [P, 3, C] to [3, C]."""
    count, _, channels = partials.shape
    stats = empty(3, channels)
    extension().merge_statistics(address("partials", partials, count, 3, channels), count, channels, written(stats))
    return stats


def finalize_batch_norm(
    partials: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    skip_nonfinite: bool,
) -> Tensor:
    """BatchNorm from partial statistics [P, 3, C]: scale, shift, mean and rstd as rows of [4, C].

    The reference says how the running statistics, if given, are moved in place.
    """
    count, _, channels = partials.shape
    if count == 0 or (running_mean is None) != (running_var is None):
        raise ValueError("expected at least one partial, and running_mean and running_var together")
    folded = empty(4, channels)
    extension().finalize_batch_norm(
        address("partials", partials, count, 3, channels),
        count,
        channels,
        address("weight", weight, channels),
        address("bias", bias, channels),
        address("running_mean", running_mean, channels),
        address("running_var", running_var, channels),
        1.0 / float(momentum) if isinstance(momentum, Tensor) else momentum,
        eps,
        skip_nonfinite,
        written(folded),
    )
    return folded


def finalize_batch_norm_backward(
    sums: Tensor, count: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward on vectors: partial sums [P, 2, C] of dz and dz * (y - mean) over ``count`` pixels to
    the coefficients [3, C] of :class:`~effnet_kernels.fusion.spec.OutputGradient`, dweight [C] and dbias [C].
    """
    partials, _, channels = sums.shape
    coefficients = empty(3, channels)
    # Tensors of their own, so that autograd takes them for gradients as they are.
    dweight, dbias = empty(channels), empty(channels)
    memory, partial_stride, kind_stride, channel_stride = strided_address("sums", sums, partials, 2, channels)
    if channel_stride != 1 and channels > 1:
        raise ValueError(f"sums: expected stride 1 of channels, got strides {sums.stride()}")
    extension().finalize_batch_norm_backward(
        memory,
        partials,
        partial_stride,
        kind_stride,
        channels,
        count,
        address("weight", weight, channels),
        address("mean", mean, channels),
        address("rstd", rstd, channels),
        batch_statistics,
        written(coefficients),
        written(dweight),
        written(dbias),
    )
    return coefficients, dweight, dbias


def _partition(x: Tensor, by_image: bool) -> Any:
    return extension().partition_pixels(x.shape[0], x.shape[2] * x.shape[3], by_image)
