"""BatchNorm as a scale and a shift."""

import torch
from torch import Tensor

from effnet_kernels import dispatch, reference
from effnet_kernels.ops.checks import any_requires_grad, check_shape, check_tensor, fits_kernels
from effnet_kernels.primitives import primitives_for


def fold_batch_norm(
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """BatchNorm as a scale and a shift for each channel.

    Args:
        stats: [3, C] count, mean and M2 of the raw output, to normalise by the batch's statistics; None to normalise
            by the running ones.
        weight, bias: [C], BatchNorm's gamma and beta; None for one and zero.
        running_mean, running_var: [C]. With ``stats`` they are moved towards the batch's in place.
        momentum: the weight of the new statistics, as ``torch.nn.BatchNorm2d`` has it.
        eps: added to the variance.

    Returns:
        scale [C] and shift [C].

    Raises:
        ValueError: shapes or devices that do not fit, or neither batch nor running statistics.

    Source: Ioffe and Szegedy 2015, algorithms 1 and 2.
    """
    if stats is None and (running_mean is None or running_var is None):
        raise ValueError("expected stats, or running_mean and running_var, got neither")
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var together, got one of them")
    like = running_mean if stats is None else stats
    assert like is not None
    check_tensor(like, *(("running_mean", "[C]") if stats is None else ("stats", "[3, C]")))
    channels = like.shape[-1]
    check_shape(stats, (3, channels), "stats", like)
    for name, vector in zip(
        ("weight", "bias", "running_mean", "running_var"), (weight, bias, running_mean, running_var), strict=True
    ):
        check_shape(vector, (channels,), name, like)
    vectors = (weight, bias, running_mean, running_var)
    if (
        stats is not None
        and dispatch.has_kernels(stats)
        and fits_kernels(stats, None, None, *vectors)
        and all(v is None or (v.is_contiguous() and not v.is_neg()) for v in vectors)
        and not any_requires_grad(stats, weight, bias)
    ):
        primitives = primitives_for(stats)
        scale, shift, _, _ = primitives.fold_batch_norm(stats.contiguous()[None], *vectors, momentum, eps)
        if running_mean is not None and running_var is not None:
            # A kernel's writes are invisible to autograd unless it is told.
            torch.autograd.graph.increment_version([running_mean, running_var])
        return scale, shift
    return reference.fold_batch_norm(stats, weight, bias, running_mean, running_var, momentum, eps)
