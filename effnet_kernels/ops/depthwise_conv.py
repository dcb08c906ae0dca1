"""The depthwise convolution of a deferred activation: native on the CPU at inference, else the reference."""

import torch
from torch import Tensor

from effnet_kernels import cpu, dispatch, reference
from effnet_kernels.deferred import REDUCTIONS, Epilogue, Padding, Prologue, Reduction
from effnet_kernels.ops.checks import (
    any_requires_grad,
    check_choice,
    check_epilogue,
    check_map,
    check_prologue,
    check_shape,
    check_tensor,
    fits_triton,
    output_size,
    resolve_padding,
)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int | Padding | str = 0,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """k x k depthwise convolution of a deferred activation.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; channels-last is fastest.
        weight: [C, 1, k, k], k odd.
        stride: at least 1, of rows and columns alike.
        padding: an integer, (left, right, top, bottom), or ``"same"`` (TensorFlow's); zeros after the prologue.
        prologue: what is owed to ``x``, paid on load.
        epilogue: what is applied to the output before it is stored.
        reduction: ``"statistics"`` returns the [3, C] count, mean and M2 of the stored output beside it; ``"pool"``
            its spatial mean [N, C] (the squeeze, at no pass of its own).

    Returns:
        ``(y [N, C, H', W'], None)``, ``(y, stats [3, C])`` or ``(y, pooled [N, C])``.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.

    Source: Howard et al. 2017 (MobileNets), section 3.1.
    """
    check_map(x)
    check_choice(reduction, REDUCTIONS, "reduction")
    check_tensor(weight, "weight", "[C, 1, k, k]")
    kernel = weight.shape[-1]
    if kernel % 2 == 0:
        raise ValueError(f"weight: expected an odd kernel size, got {kernel}")
    check_shape(weight, (x.shape[1], 1, kernel, kernel), "weight", x)
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: expected an integer >= 1, got {stride!r}")
    samples, channels, height, width = x.shape
    left, right, top, bottom = pads = resolve_padding(padding, (height, width), kernel, stride)
    rows = output_size(height, kernel, stride, top, bottom)
    columns = output_size(width, kernel, stride, left, right)
    check_prologue(prologue, x)
    check_epilogue(epilogue, x, (samples, channels, rows, columns))
    if (
        has_triton_depthwise(kernel, stride)
        and dispatch.runs_on_triton(x)
        and fits_triton(x, prologue, epilogue, weight)
        and (prologue is None or prologue.gate is None)
        and (epilogue is None or epilogue.residual is None)
    ):
        return _on_triton(x, weight, stride, pads, prologue or Prologue(), epilogue or Epilogue(), reduction)
    if prologue is None and has_native_depthwise(kernel) and reduction != "statistics":
        scale, shift, act, residual, statistics = epilogue or Epilogue()
        parameters = [t for t in (weight, scale, shift) if t is not None]
        # Parameters of another dtype than the map's are the reference's.
        if (
            residual is None
            and statistics is None
            and all(t.dtype == x.dtype for t in parameters)
            and dispatch.runs_natively(x, any_requires_grad(x, *parameters))
        ):
            x = x.contiguous(memory_format=torch.channels_last)
            scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
            return cpu.depthwise_conv(x, weight, stride, pads, Epilogue(scale, shift, act), reduction == "pool")
    return reference.depthwise_conv(x, weight, stride, pads, prologue, epilogue, reduction)


def _on_triton(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    prologue: Prologue,
    epilogue: Epilogue,
    reduction: Reduction,
) -> tuple[Tensor, Tensor | None]:
    from effnet_kernels.ops.triton_functions import DepthwiseConv
    from effnet_kernels.triton import batch_norm, depthwise, squeeze_excite

    x = x.contiguous(memory_format=torch.channels_last)
    if any_requires_grad(x, weight, *prologue):
        return DepthwiseConv.apply(x, weight, *prologue[:3], stride, padding, reduction)
    y, partials = depthwise.depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction)
    if partials is None:
        return y, None
    if reduction == "pool":
        return y, squeeze_excite.mean_of_sums(partials, y.shape[2] * y.shape[3])
    return y, batch_norm.merge_statistics(partials)


def has_native_depthwise(kernel: int) -> bool:
    """Whether the native extension has a depthwise kernel of this size."""
    return kernel in cpu.KERNEL_SIZES


def has_triton_depthwise(kernel: int, stride: int) -> bool:
    """Whether the Triton kernels have this size and stride."""
    return kernel in (3, 5, 7) and stride in (1, 2)


def no_depthwise(kernel: int, stride: int) -> str:
    """What is missing, for those who ask why a block does not run on the kernels."""
    return f"no depthwise kernel of size {kernel} and stride {stride}"
