"""BatchNorm as a scale and a shift."""

import torch
from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.batch_norm import scale_and_shift
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.ops.checks import any_requires_grad, check_shape, check_tensor, fits_kernels


def finalize_batch_norm(
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    skip_nonfinite_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """BatchNorm as a scale and a shift for each channel.

    Args:
        stats: [3, C] count, mean and M2 of the raw output, to normalise by the batch's statistics; None to normalise
            by the running ones.
        weight, bias: [C], BatchNorm's; None for one and zero.
        running_mean, running_var: [C]. With ``stats`` they are moved towards the batch's in place.
        momentum: the weight of the new statistics, as ``torch.nn.BatchNorm2d`` has it.
        eps: added to the variance.
        skip_nonfinite_statistics: whether the running statistics of a channel stay as they are where those of the batch
            are not finite, for training with a gradient scaler. torch's batch_norm writes them.

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
    if stats is None:
        assert running_mean is not None
        assert running_var is not None
        return scale_and_shift(running_mean, torch.rsqrt(running_var + eps), weight, bias)
    backend = select.operator_backend(stats)
    if backend != "reference" and not (
        fits_kernels(stats, None, None, *vectors)
        and all(v is None or (v.is_contiguous() and not v.is_neg()) for v in vectors)
        and not any_requires_grad(stats, weight, bias)
    ):
        backend = "reference"
    partials = stats[None] if backend == "reference" else stats.contiguous()[None]
    folded = primitives_of(backend).finalize_batch_norm(partials, *vectors, momentum, eps, skip_nonfinite_statistics)
    if running_mean is not None and running_var is not None:
        # These writes are invisible to autograd unless it is told.
        torch.autograd.graph.increment_version([running_mean, running_var])
    return folded[0], folded[1]
