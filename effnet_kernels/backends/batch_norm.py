"""The arithmetic of BatchNorm that all backends share (Ioffe and Szegedy 2015, algorithm 1)."""

import torch
from torch import Tensor

from effnet_kernels.fusion.spec import BatchNorm


def scale_and_shift(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """BatchNorm as ``scale * y + shift``, [C] each, from a mean and a reciprocal standard deviation.

    Without ``weight`` and ``bias`` these are one and zero.
    """
    scale = rstd if weight is None else rstd * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def folded(norm: BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode, behind a convolution with a bias, as ``scale * y + shift``: [C] each, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, rstd = norm.running_mean.double(), torch.rsqrt(norm.running_var.double() + norm.eps)
    scale, shift = scale_and_shift(mean, rstd, norm.weight, norm.bias)
    return scale, shift if bias is None else shift + bias.double() * scale


def check_batch(size: torch.Size) -> None:
    """Raises torch's own ValueError where BatchNorm would normalise a single value a channel of such a map."""
    if size.numel() == size[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
