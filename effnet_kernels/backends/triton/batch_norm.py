"""BatchNorm as arithmetic on vectors of channels, and the passes over maps that its statistics need."""

import torch
from torch import Tensor

from effnet_kernels.backends.triton.configs import target_of
from effnet_kernels.backends.triton.configs.elementwise import stream
from effnet_kernels.backends.triton.kernels.batch_norm import (
    apply_gradient_kernel,
    channel_statistics_kernel,
    finalize_batch_norm_backward_kernel,
    finalize_batch_norm_kernel,
    gradient_sums_kernel,
    merge_statistics_kernel,
)
from effnet_kernels.backends.triton.launch import channel_divisor, launcher
from effnet_kernels.fusion.spec import OutputGradient

launch_apply_gradient = launcher(apply_gradient_kernel)
launch_channel_statistics = launcher(channel_statistics_kernel)
launch_finalize_batch_norm = launcher(finalize_batch_norm_kernel)
launch_finalize_batch_norm_backward = launcher(finalize_batch_norm_backward_kernel)
launch_gradient_sums = launcher(gradient_sums_kernel)
launch_merge_statistics = launcher(merge_statistics_kernel)

# The most partial results of a channel that a pass over a map leaves; the kernels on vectors merge them.
MAX_PARTIALS = 256
# So that all partial results of a channel are loaded at once, and there are programs enough to load them.
_BLOCK_PARTIALS, _BLOCK_VECTOR, _WARPS_VECTOR = 256, 8, 8


def channel_statistics(y: Tensor) -> Tensor:
    """Partial (count, mean, M2) of each channel: y [N, C, H, W] to [P, 3, C] fp32."""
    samples, channels, height, width = y.shape
    rows = samples * height * width
    config = stream(1, rows, channels, target_of(y), MAX_PARTIALS)
    partials = torch.empty(config.num_programs, 3, channels, dtype=torch.float32, device=y.device)
    divisor = channel_divisor(channels)
    launch_channel_statistics(
        (config.num_programs, -(-channels // config.block_c), 1),
        y_ptr=y,
        partials_ptr=partials,
        rows=rows,
        c_quotient=channels // divisor,
        C_DIVISOR=divisor,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return partials


def gradient_sums(gradient: OutputGradient, mean: Tensor) -> Tensor:
    """Partial sums over pixels of dz and of dz * (y - mean), for BatchNorm's backward: [P, 2, C] in fp32."""
    y = gradient.y
    assert y is not None
    samples, channels, height, width = y.shape
    groups, rows = (samples, height * width) if gradient.by_sample() else (1, samples * height * width)
    config = stream(groups, rows, channels, target_of(y), max(1, MAX_PARTIALS // groups))
    sums = torch.empty(groups * config.num_programs, 2, channels, dtype=torch.float32, device=y.device)
    divisor = channel_divisor(channels)
    launch_gradient_sums(
        (config.num_programs, -(-channels // config.block_c), groups),
        grad_ptr=gradient.grad,
        y_ptr=y,
        gate_ptr=gradient.gate,
        drop_path_scale_ptr=gradient.drop_path_scale,
        offset_ptr=gradient.offset,
        scale_ptr=gradient.scale,
        shift_ptr=gradient.shift,
        mean_ptr=mean,
        sums_ptr=sums,
        rows=rows,
        c_quotient=channels // divisor,
        ACT=gradient.act,
        C_DIVISOR=divisor,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        SUM_ROWS=config.sum_rows(y.dtype),
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return sums


def apply_gradient(gradient: OutputGradient, residual: Tensor | None) -> Tensor:
    """dy of ``gradient`` as a map [N, C, H, W], plus the gradient ``residual``, for a convolution of torch's."""
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    samples, channels, height, width = like.shape
    groups, rows = (samples, height * width) if gradient.by_sample() else (1, samples * height * width)
    config = stream(groups, rows, channels, target_of(like))
    out = torch.empty_like(like, memory_format=torch.channels_last)
    divisor = channel_divisor(channels)
    launch_apply_gradient(
        (config.num_programs, -(-channels // config.block_c), groups),
        grad_ptr=gradient.grad,
        y_ptr=gradient.y,
        coefficients_ptr=gradient.coefficients,
        gate_ptr=gradient.gate,
        drop_path_scale_ptr=gradient.drop_path_scale,
        offset_ptr=gradient.offset,
        scale_ptr=gradient.scale,
        shift_ptr=gradient.shift,
        grad_residual_ptr=residual,
        out_ptr=out,
        rows=rows,
        c_quotient=channels // divisor,
        ACT=gradient.act,
        C_DIVISOR=divisor,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return out


def merge_statistics(partials: Tensor) -> Tensor:
    """Count, mean and M2 of the union of partials: [P, 3, C] to [3, C] fp32."""
    count, _, channels = partials.shape
    stats = torch.empty(3, channels, dtype=torch.float32, device=partials.device)
    launch_merge_statistics(
        (-(-channels // _BLOCK_VECTOR), 1, 1),
        partials_ptr=partials,
        stats_ptr=stats,
        P=count,
        C=channels,
        BLOCK_P=_BLOCK_PARTIALS,
        BLOCK_C=_BLOCK_VECTOR,
        num_warps=_WARPS_VECTOR,
    )
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
    """BatchNorm from partial statistics [P, 3, C]: scale, shift, mean and rstd as rows of [4, C], fp32.

    The running statistics, if given, are moved by ``momentum`` in place (by 1 / count where it is the tensor
    ``num_batches_tracked``), ``running_var`` towards the unbiased variance. With ``skip_nonfinite`` those of a channel
    whose batch statistics are not finite stay as they are.
    """
    count, _, channels = partials.shape
    folded = torch.empty(4, channels, dtype=torch.float32, device=partials.device)
    launch_finalize_batch_norm(
        (-(-channels // _BLOCK_VECTOR), 1, 1),
        partials_ptr=partials,
        weight_ptr=weight,
        bias_ptr=bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        batches_ptr=momentum if isinstance(momentum, Tensor) else None,
        folded_ptr=folded,
        P=count,
        C=channels,
        momentum=0.0 if isinstance(momentum, Tensor) else float(momentum),
        eps=eps,
        SKIP_NONFINITE=skip_nonfinite,
        BLOCK_P=_BLOCK_PARTIALS,
        BLOCK_C=_BLOCK_VECTOR,
        num_warps=_WARPS_VECTOR,
    )
    return folded


def finalize_batch_norm_backward(
    sums: Tensor, count: int, weight: Tensor | None, mean: Tensor, rstd: Tensor, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward on vectors: partial sums [P, 2, C] of dz and dz * (y - mean) over ``count`` pixels to
    the coefficients [3, C] of :class:`~effnet_kernels.fusion.spec.OutputGradient`, dweight [C] and dbias [C], fp32.
    """
    partials, _, channels = sums.shape
    coefficients = torch.empty(3, channels, dtype=torch.float32, device=sums.device)
    # Two tensors and not rows of one, so that autograd takes them over as gradients without a copy.
    dweight, dbias = (torch.empty(channels, dtype=torch.float32, device=sums.device) for _ in range(2))
    launch_finalize_batch_norm_backward(
        (-(-channels // _BLOCK_VECTOR), 1, 1),
        sums_ptr=sums,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        coefficients_ptr=coefficients,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        P=partials,
        C=channels,
        partial_stride=sums.stride(0),
        sum_stride=sums.stride(1),
        reciprocal_count=1.0 / count,
        BATCH_STATISTICS=batch_statistics,
        BLOCK_P=_BLOCK_PARTIALS,
        BLOCK_C=_BLOCK_VECTOR,
        num_warps=_WARPS_VECTOR,
    )
    return coefficients, dweight, dbias
