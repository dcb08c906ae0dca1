"""BatchNorm (Ioffe and Szegedy 2015, algorithms 1 and 2) from partial statistics, forward and backward."""

import torch
from torch import Tensor

from effnet_kernels.backends.batch_norm import scale_and_shift
from effnet_kernels.backends.reference.operands import by_channel, norm_gradient, output_gradient
from effnet_kernels.fusion.spec import OutputGradient, accumulation_dtype


def channel_statistics(y: Tensor) -> Tensor:
    """Count, mean and M2 (the sum of squared deviations) of each channel: y [N, C, H, W] to [1, 3, C].

    They are the statistics of the stored values: ``y`` has been rounded to its dtype already.
    """
    y = y.to(accumulation_dtype(y.dtype))
    mean = y.mean(dim=(0, 2, 3))
    m2 = (y - by_channel(mean)).square().sum(dim=(0, 2, 3))
    count = torch.full_like(mean, y.shape[0] * y.shape[2] * y.shape[3])
    return torch.stack([count, mean, m2])[None]


def merge_statistics(partials: Tensor) -> Tensor:
    """Count, mean and M2 of the union of partials, [P, 3, C] to [3, C] (Chan, Golub and LeVeque 1983)."""
    if partials.shape[0] == 1:
        return partials[0]
    counts, means, m2s = partials.unbind(dim=1)
    count = counts.sum(dim=0)
    # A partial of no values may hold anything.
    mean = torch.where(counts > 0, counts * means, 0.0).sum(dim=0) / count
    deviations = counts * (means - mean).square()
    return torch.stack([count, mean, torch.where(counts > 0, m2s + deviations, 0.0).sum(dim=0)])


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

    The running statistics, if given, are moved by ``momentum`` in place (by 1 / count where it is the tensor
    ``num_batches_tracked``), ``running_var`` towards the unbiased variance. With ``skip_nonfinite`` those of a channel
    whose batch statistics are not finite stay as they are.
    """
    count, mean, m2 = merge_statistics(partials)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            step = 1.0 / momentum.to(mean.dtype) if isinstance(momentum, Tensor) else momentum
            # As torch.nn.functional.batch_norm has it, an empty batch moves nothing.
            moves = count > 0
            if skip_nonfinite:
                moves = moves & torch.isfinite(mean) & torch.isfinite(m2)
            for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
                moved = (1.0 - step) * running + step * batch
                running.data.copy_(torch.where(moves, moved.to(running.dtype), running))
    rstd = torch.rsqrt(m2 / count + eps)
    return torch.stack([*scale_and_shift(mean, rstd, weight, bias), mean, rstd])


def finalize_batch_norm_backward(
    sums: Tensor, count: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward on vectors: partial sums [P, 2, C] of dz and dz * (y - mean) over ``count`` pixels to
    the coefficients [3, C] of :class:`~effnet_kernels.fusion.spec.OutputGradient`, dweight [C] and dbias [C].
    """
    dbias, centred = sums.sum(dim=0)
    alpha = rstd if weight is None else rstd * weight
    beta = -alpha * rstd.square() * centred / count if batch_statistics else torch.zeros_like(alpha)
    gamma = -alpha * dbias / count - beta * mean if batch_statistics else torch.zeros_like(alpha)
    return torch.stack([alpha, beta, gamma]), rstd * centred, dbias


def gradient_sums(gradient: OutputGradient, mean: Tensor) -> Tensor:
    """Sums over pixels of dz and dz * (y - mean), for BatchNorm's backward: [1, 2, C]."""
    assert gradient.y is not None
    dz = norm_gradient(gradient)
    products = (dz, dz * (gradient.y - by_channel(mean)))
    return torch.stack([product.sum(dim=(0, 2, 3)) for product in products])[None]


def apply_gradient(gradient: OutputGradient, residual: Tensor | None) -> Tensor:
    """dy of ``gradient`` as a map [N, C, H, W], plus ``residual``: for a convolution that torch computes."""
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    dy = output_gradient(gradient)
    dy = dy if residual is None else dy + residual
    return dy.to(like.dtype).contiguous(memory_format=torch.channels_last)
