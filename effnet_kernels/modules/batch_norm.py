"""A BatchNorm module read as a scale and a shift."""

import torch
from torch import Tensor, nn

from effnet_kernels import ops


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether the module normalises by the batch's statistics, as torch decides it."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def fold(norm: nn.BatchNorm2d, stats: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a BatchNorm, from the batch's statistics [3, C] or, without them, the running ones.

    Running statistics and ``num_batches_tracked`` are updated where ``nn.BatchNorm2d`` would.
    """
    if stats is None:
        return ops.fold_batch_norm(None, norm.weight, norm.bias, norm.running_mean, norm.running_var, eps=norm.eps)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracking = norm.training and norm.track_running_stats
    if tracking and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = (norm.running_mean, norm.running_var) if tracking else (None, None)
    return ops.fold_batch_norm(stats, norm.weight, norm.bias, mean, var, momentum, norm.eps)


def check_batch(norm: nn.BatchNorm2d, y: Tensor) -> None:
    """The error that torch raises where one value a channel has no variance."""
    if norm.training and y.shape[0] * y.shape[2] * y.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
