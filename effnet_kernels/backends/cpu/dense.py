"""Dense convolutions on the CPU: those of few channels as a product with patches, the rest torch's own.

A stem's patches are as many numbers as its output, and a product with them runs at the speed of a 1x1 convolution; a
library's convolution wants more channels to be fast.
"""

import torch
from torch import Tensor

from effnet_kernels.backends import dense, profiling
from effnet_kernels.backends.cpu import batch_norm
from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import cast_map, empty_map, execution, map_address, written
from effnet_kernels.backends.cpu.pointwise import pointwise_conv, pointwise_conv_backward
from effnet_kernels.backends.operands import as_contiguous
from effnet_kernels.fusion.geometry import output_map
from effnet_kernels.fusion.spec import Epilogue, OutputGradient, Padding, Prologue, Reduction

# Above this many numbers in a patch torch's convolution is as fast.
_MOST_PATCH = 64


def dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [K, C, k, k], bias [K] to y [N, K, H', W'], and partial statistics [P, 3, K] of it.

    torch's convolution is in the dtype of x, which may be bfloat16; y is in float32.
    """
    if convolves_patches(weight):
        if profiling.enabled():
            profiling.record_convolution(x.shape, weight, stride, padding)
        y, partials = pointwise_conv(
            _patches(x, weight, stride, padding), _matrix(weight), bias, Prologue(), Epilogue(), reduction
        )
        assert y is not None
        return y, partials
    y = cast_map(dense.conv(x, weight, bias, stride, padding), torch.float32)
    return y, batch_norm.channel_statistics(y) if reduction == "statistics" else None


def dense_conv_backward(
    gradient: OutputGradient,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, plus ``residual``, and of the weight; by torch they are in the dtype of x."""
    if needs_input or not convolves_patches(weight):
        dy = cast_map(batch_norm.apply_gradient(gradient, None), x.dtype)
        return dense.conv_backward(dy, x, weight, stride, padding, residual, needs_input, needs_weight)
    if not needs_weight:
        return None, None
    patches, matrix = _patches(x, weight, stride, padding), _matrix(weight)
    _, _, dweight = pointwise_conv_backward(
        gradient, matrix, patches, Prologue(), None, None, False, needs_input=False, needs_weight=True
    )
    assert dweight is not None
    outputs, channels, kernel, _ = weight.shape
    return None, dweight.view(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)


def convolves_patches(weight: Tensor) -> bool:
    """Whether the convolution is a product with patches, in float32, instead of torch's."""
    return weight[0].numel() <= _MOST_PATCH


def _matrix(weight: Tensor) -> Tensor:
    """[K, C, k, k] to [K, k * k * C, 1, 1], in the order of a patch."""
    return as_contiguous(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1, 1, 1))


def _patches(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    samples, channels, height, width = x.shape
    kernel = weight.shape[-1]
    left, _, top, _ = padding
    out_height, out_width = output_map(height, width, kernel, stride, padding)
    patches = empty_map(samples, kernel * kernel * channels, out_height, out_width)
    extension().patches(
        (samples, channels, height, width, out_height, out_width, kernel, stride, left, top),
        map_address("x", x, samples, channels, height, width),
        written(patches),
        *execution(),
    )
    return patches
