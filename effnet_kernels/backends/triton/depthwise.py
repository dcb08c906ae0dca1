"""Launchers of the depthwise convolution of a raw output with its prologue, forward and backward."""

import torch
from torch import Tensor

from effnet_kernels.backends.triton.batch_norm import apply_gradient
from effnet_kernels.backends.triton.configs import depthwise as launch_config
from effnet_kernels.backends.triton.configs import target_of
from effnet_kernels.backends.triton.kernels.depthwise import depthwise_conv_kernel
from effnet_kernels.backends.triton.kernels.depthwise_backward import depthwise_conv_backward_kernel
from effnet_kernels.backends.triton.launch import channel_divisor, launcher
from effnet_kernels.backends.triton.pointwise import sum_partials
from effnet_kernels.fusion.spec import Epilogue, OutputGradient, Padding, Prologue, Reduction

launch_depthwise_conv = launcher(depthwise_conv_kernel)
launch_depthwise_conv_backward = launcher(depthwise_conv_backward_kernel)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    prologue: Prologue,
    epilogue: Epilogue,
    reduction: Reduction,
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [C, 1, k, k] to y [N, C, H', W'], k 3, 5 or 7, stride 1 or 2.

    The second result is partial (count, mean, M2) of the stored values, [P, 3, C], with "statistics", or their pooled
    sums, partial sums over each image's pixels [N, T, C], with "pool". One launch.
    """
    samples, channels, height, width = x.shape
    kernel = weight.shape[-1]
    left, right, top, bottom = padding
    out_height, out_width = (
        (height + top + bottom - kernel) // stride + 1,
        (width + left + right - kernel) // stride + 1,
    )
    _check_size(channels, height, width)
    _check_size(channels, out_height, out_width)
    limit = launch_config.MAX_STATISTICS if reduction == "statistics" else None
    sizes = (samples, channels, out_height, out_width, kernel, stride)
    config = launch_config.forward(*sizes, limit, x.dtype, target_of(x))
    row_strips, column_strips = -(-out_height // config.height), -(-out_width // config.width)
    strips = row_strips * column_strips
    # The strips of a program are added up where none of its programs has strips of two images.
    merges = reduction == "pool" and strips % config.strips == 0
    y = torch.empty(
        samples, channels, out_height, out_width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    partials = None
    if reduction == "statistics":
        partials = torch.empty(config.num_programs, 3, channels, dtype=torch.float32, device=x.device)
    elif reduction == "pool":
        sums = strips // config.strips if merges else strips
        partials = torch.empty(samples, sums, channels, dtype=torch.float32, device=x.device)
    statistics = epilogue.statistics
    divisor = channel_divisor(channels)
    launch_depthwise_conv(
        (config.num_programs, -(-channels // config.block_c), 1),
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=prologue.scale,
        shift_ptr=prologue.shift,
        out_scale_ptr=epilogue.scale,
        out_shift_ptr=epilogue.shift,
        out_mean_ptr=None if statistics is None else statistics.mean,
        out_var_ptr=None if statistics is None else statistics.var,
        y_ptr=y,
        partials_ptr=partials,
        strips=samples * strips,
        c_quotient=channels // divisor,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        pad_top=top,
        pad_left=left,
        row_strips=row_strips,
        column_strips=column_strips,
        strip_height=config.height,
        # With a single strip from top to bottom, the steps that read only the padding above the map are left out, but
        # for those that complete an output row.
        first_step=min(top // stride, -(-kernel // stride) - 1) if row_strips == 1 else 0,
        eps=0.0 if statistics is None else statistics.eps,
        ACT=prologue.act,
        OUT_ACT=epilogue.act,
        REDUCTION=reduction,
        MERGES=merges,
        C_DIVISOR=divisor,
        K=kernel,
        STRIDE=stride,
        WIDTH=config.width,
        STRIPS=config.strips,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
    """The gradient of z = scale * x + shift, dz [N, C, H, W], plus the gradient ``residual``; no prologue means z = x.

    Also, with ``mean`` [C], partial sums [P, 2, C] of dz and of dz * (x - mean), and dweight [C, 1, k, k] in fp32. Two
    launches, or three where the gradient has to be formed first.
    """
    samples, channels, height, width = x.shape
    if gradient.grad is None or gradient.drop_path_scale is not None:
        # At the end of a chain, which is pooled or has stochastic depth.
        gradient = OutputGradient(apply_gradient(gradient, None))
        assert gradient.grad is not None
    out_height, out_width = gradient.grad.shape[2:]
    kernel = weight.shape[-1]
    left, _, top, _ = padding
    # Strips begin at multiples of the stride, counted from the padding's corner, and so up to stride - 1 pixels early.
    rows, columns = height + top % stride, width + left % stride
    activates = prologue.act != "none"
    config = launch_config.backward(samples, channels, rows, columns, kernel, stride, activates, x.dtype, target_of(x))
    row_strips, column_strips = -(-rows // config.height), -(-columns // config.width)
    _check_size(channels, height, width)
    _check_size(channels, out_height, out_width)
    dz = torch.empty_like(x, memory_format=torch.channels_last)
    sums = None
    if mean is not None:
        sums = torch.empty(config.num_programs, 2, channels, dtype=torch.float32, device=x.device)
    dweight = torch.empty(config.num_programs, channels, 1, kernel, kernel, dtype=torch.float32, device=x.device)
    divisor = channel_divisor(channels)
    launch_depthwise_conv_backward(
        (config.num_programs, -(-channels // config.block_c), 1),
        grad_ptr=gradient.grad,
        y_ptr=gradient.y,
        coefficients_ptr=gradient.coefficients,
        out_gate_ptr=gradient.gate,
        offset_ptr=gradient.offset,
        out_scale_ptr=gradient.scale,
        out_shift_ptr=gradient.shift,
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=prologue.scale,
        shift_ptr=prologue.shift,
        mean_ptr=mean,
        grad_residual_ptr=residual,
        dz_ptr=dz,
        sums_ptr=sums,
        dweight_ptr=dweight,
        strips=samples * row_strips * column_strips,
        c_quotient=channels // divisor,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        pad_top=top,
        pad_left=left,
        row_strips=row_strips,
        column_strips=column_strips,
        strip_height=config.height,
        OUT_ACT=gradient.act,
        ACT=prologue.act,
        C_DIVISOR=divisor,
        K=kernel,
        STRIDE=stride,
        WIDTH=config.width,
        STRIPS=config.strips,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dz, sums, sum_partials(dweight)


def _check_size(channels: int, height: int, width: int) -> None:
    """Raises ValueError for a map in which the kernels cannot count: they have 32 bits for the values of an image."""
    if channels * height * width >= 2**31:
        raise ValueError(
            f"expected fewer than 2**31 values an image in a depthwise convolution's maps, got {channels} channels of "
            f"{height} x {width}"
        )
