"""Launchers of the pointwise (1x1) convolution of a raw output with its prologue, forward and backward."""

import torch
from torch import Tensor

from effnet_kernels.backends.triton.batch_norm import apply_gradient
from effnet_kernels.backends.triton.configs import target_of
from effnet_kernels.backends.triton.configs.elementwise import partial_sums
from effnet_kernels.backends.triton.configs.pointwise import MAX_STATISTICS, MAX_SUMS, gemm, weight_gradient
from effnet_kernels.backends.triton.kernels.pointwise import (
    pointwise_conv_backward_data_kernel,
    pointwise_conv_backward_weight_kernel,
    pointwise_conv_kernel,
    sum_partials_kernel,
)
from effnet_kernels.backends.triton.launch import channel_divisor, dot_precision, launcher
from effnet_kernels.fusion.spec import Epilogue, OutputGradient, Prologue, Reduction

launch_pointwise_conv = launcher(pointwise_conv_kernel)
launch_pointwise_conv_backward_data = launcher(pointwise_conv_backward_data_kernel)
launch_pointwise_conv_backward_weight = launcher(pointwise_conv_backward_weight_kernel)
launch_sum_partials = launcher(sum_partials_kernel)


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, prologue: Prologue, epilogue: Epilogue, reduction: Reduction
) -> tuple[Tensor | None, Tensor | None]:
    """x [N, C, H, W], weight [K, C, 1, 1], bias [K] to ``(y [N, K, H, W], None)``.

    With "statistics" the second result is partial (count, mean, M2) of the stored values, [P, 3, K]. With "pool" no map
    is stored, and the second result is pooled sums: partial sums of the epilogue's values over each image's pixels,
    [N, T, K]. One launch.
    """
    samples, channels = x.shape[:2]
    outputs = weight.shape[0]
    pools = reduction == "pool"
    owners = samples if pools else 1
    by_sample = pools or prologue.gate is not None
    groups, rows = _groups(x, by_sample, owners)
    limit = {"none": None, "statistics": MAX_STATISTICS, "pool": MAX_SUMS}[reduction]
    activates = prologue.act != "none"
    config = gemm(owners, groups, rows, outputs, channels, limit, activates, False, x.dtype, target_of(x))
    y, partials = None, None
    if not pools:
        y = _empty_map(x, outputs)
    if reduction == "statistics":
        partials = torch.empty(config.num_programs, 3, outputs, dtype=torch.float32, device=x.device)
    elif pools:
        partials = torch.empty(samples, config.num_programs, outputs, dtype=torch.float32, device=x.device)
    statistics = epilogue.statistics
    in_divisor, out_divisor = channel_divisor(channels), channel_divisor(outputs)
    launch_pointwise_conv(
        (-(-outputs // config.block_n), config.num_programs, owners),
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=prologue.scale,
        shift_ptr=prologue.shift,
        gate_ptr=prologue.gate,
        out_scale_ptr=epilogue.scale,
        out_shift_ptr=epilogue.shift,
        out_mean_ptr=None if statistics is None else statistics.mean,
        out_var_ptr=None if statistics is None else statistics.var,
        residual_ptr=epilogue.residual,
        y_ptr=y,
        partials_ptr=partials,
        rows=rows,
        groups=groups,
        in_quotient=channels // in_divisor,
        out_quotient=outputs // out_divisor,
        eps=0.0 if statistics is None else statistics.eps,
        ACT=prologue.act,
        OUT_ACT=epilogue.act,
        REDUCTION=reduction,
        PRECISION=dot_precision(x.dtype),
        IN_DIVISOR=in_divisor,
        OUT_DIVISOR=out_divisor,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )
    return y, partials


def pointwise_conv_backward_data(
    gradient: OutputGradient,
    weight: Tensor,
    x: Tensor | None,
    prologue: Prologue,
    mean: Tensor | None,
    grad_residual: Tensor | None,
    apply_act_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the convolution's input, [N, C, H, W], plus ``grad_residual``.

    Without ``x`` the input is a map as it is, and this is its gradient dq. With the raw output ``x``, the input is u
    times the gate, u = act(scale * x + shift) by ``prologue``, and dq is its gradient. The result is then dq, or with
    ``apply_act_grad`` the gradient of scale * x + shift, gate * dq * u', in which u' is the activation's derivative.
    The second result is partial sums over each image's pixels, [N, T, 3, C]:

        grad_gate = sum of dq * u
        grad_shift = sum of dq * u'
        grad_scale = sum of dq * u' * (x - mean)

    Those of u' alone are made in the forward pass, by :func:`.squeeze_excite.squeeze_for_backward`. One launch.
    """
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    samples, outputs, _, _ = like.shape
    channels = weight.shape[1]
    owners = samples if x is not None else 1
    groups, rows = _groups(like, x is not None or gradient.by_sample(), owners)
    limit = None if x is None else MAX_SUMS
    computes = gradient.y is not None
    config = gemm(owners, groups, rows, channels, outputs, limit, computes, x is not None, like.dtype, target_of(like))
    dx = _empty_map(like, channels)
    sums = None
    if x is not None:
        sums = torch.empty(samples, config.num_programs, 3, channels, dtype=torch.float32, device=like.device)
    in_divisor, out_divisor = channel_divisor(channels), channel_divisor(outputs)
    launch_pointwise_conv_backward_data(
        (-(-channels // config.block_n), config.num_programs, owners),
        **_gradient_arguments(gradient),
        weight_ptr=weight,
        x_ptr=x,
        scale_ptr=prologue.scale,
        shift_ptr=prologue.shift,
        gate_ptr=prologue.gate,
        mean_ptr=mean,
        grad_residual_ptr=grad_residual,
        dx_ptr=dx,
        sums_ptr=sums,
        rows=rows,
        groups=groups,
        in_quotient=channels // in_divisor,
        out_quotient=outputs // out_divisor,
        OUT_ACT=gradient.act,
        ACT=prologue.act,
        APPLY_ACT_GRAD=apply_act_grad,
        PRECISION=dot_precision(like.dtype),
        IN_DIVISOR=in_divisor,
        OUT_DIVISOR=out_divisor,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )
    return dx, sums


def pointwise_conv_backward_weight(gradient: OutputGradient, x: Tensor, prologue: Prologue) -> Tensor:
    """The weight's gradient [K, C, 1, 1], fp32, from x [N, C, H, W] and its prologue. One launch or two."""
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    outputs, channels = like.shape[1], x.shape[1]
    groups, rows = _groups(x, prologue.gate is not None or gradient.by_sample(), 1)
    config = weight_gradient(groups, rows, outputs, channels, x.dtype, target_of(x))
    partials = torch.empty(config.split_k, outputs, channels, 1, 1, dtype=torch.float32, device=x.device)
    in_divisor, out_divisor = channel_divisor(channels), channel_divisor(outputs)
    launch_pointwise_conv_backward_weight(
        (-(-channels // config.block_n), -(-outputs // config.block_m), config.split_k),
        **_gradient_arguments(gradient),
        x_ptr=x,
        scale_ptr=prologue.scale,
        shift_ptr=prologue.shift,
        gate_ptr=prologue.gate,
        partials_ptr=partials,
        rows=rows,
        groups=groups,
        in_quotient=channels // in_divisor,
        out_quotient=outputs // out_divisor,
        OUT_ACT=gradient.act,
        ACT=prologue.act,
        PRECISION=dot_precision(x.dtype),
        IN_DIVISOR=in_divisor,
        OUT_DIVISOR=out_divisor,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )
    return sum_partials(partials)


def pointwise_conv_backward(
    gradient: OutputGradient,
    weight: Tensor,
    x: Tensor,
    prologue: Prologue,
    mean: Tensor | None,
    residual: Tensor | None,
    apply_act_grad: bool,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that are needed: dx and sums of :func:`pointwise_conv_backward_data`, and the weight's of
    :func:`pointwise_conv_backward_weight`. With ``mean`` x is a raw output, whose ``prologue`` is differentiated.
    """
    dx, sums, dweight = None, None, None
    if needs_weight and needs_input and _is_formed_first(gradient, weight):
        gradient = OutputGradient(apply_gradient(gradient, None))
    if needs_weight:
        dweight = pointwise_conv_backward_weight(gradient, x, prologue)
    if needs_input:
        raw = None if mean is None else x
        differentiated = Prologue() if mean is None else prologue
        dx, sums = pointwise_conv_backward_data(gradient, weight, raw, differentiated, mean, residual, apply_act_grad)
    return dx, sums, dweight


def _is_formed_first(gradient: OutputGradient, weight: Tensor) -> bool:
    """Whether the gradient of the output is formed once, as a map, instead of on each load.

    Each block of 64 input channels loads it, twice: for the data and for the weight gradient. Where outputs are few, as
    those of project convolutions, their map is small beside the input's.
    """
    outputs, channels = weight.shape[:2]
    return gradient.y is not None and channels >= 3 * outputs and channels >= 4 * 64


def sum_partials(partials: Tensor) -> Tensor:
    """The sum over the first dimension: [P, ...] to [...], fp32; nothing is launched for a single partial."""
    if partials.shape[0] == 1:
        return partials[0]
    total = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    block_p, block = partial_sums(total.numel(), target_of(partials))
    launch_sum_partials(
        (-(-total.numel() // block), 1, 1),
        partials_ptr=partials,
        out_ptr=total,
        P=partials.shape[0],
        size=total.numel(),
        BLOCK_P=block_p,
        BLOCK=block,
        num_warps=4,
    )
    return total


def _groups(x: Tensor, by_sample: bool, owners: int) -> tuple[int, int]:
    """The groups of each owner, and the rows of each group; :mod:`.kernels.pointwise` says what they are."""
    samples, _, height, width = x.shape
    if by_sample:
        return samples // owners, height * width
    return 1, samples * height * width


def _empty_map(x: Tensor, channels: int) -> Tensor:
    samples, _, height, width = x.shape
    return torch.empty(
        samples, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _gradient_arguments(gradient: OutputGradient) -> dict[str, Tensor | None]:
    return {
        "grad_ptr": gradient.grad,
        "y_ptr": gradient.y,
        "coefficients_ptr": gradient.coefficients,
        "out_gate_ptr": gradient.gate,
        "drop_path_scale_ptr": gradient.drop_path_scale,
        "offset_ptr": gradient.offset,
        "out_scale_ptr": gradient.scale,
        "out_shift_ptr": gradient.shift,
    }
