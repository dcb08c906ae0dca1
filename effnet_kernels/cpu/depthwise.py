"""Depthwise convolution on the CPU: the checks, the outputs and the call."""

import torch
from torch import Tensor

from effnet_kernels.cpu.extension import extension
from effnet_kernels.deferred import ACTIVATIONS, Epilogue, Padding

KERNEL_SIZES = (3, 5, 7)
ACTIVATION_INDEX = {act: index for index, act in enumerate(ACTIVATIONS)}


def check_float_cpu(name: str, tensor: Tensor) -> None:
    """The kernels read raw memory as fp32."""
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(f"{name}: expected a float32 tensor on the CPU, got {tensor.dtype} on {tensor.device}")


def vector(name: str, tensor: Tensor | None, channels: int) -> int:
    """Address of a contiguous [C] vector, 0 for None."""
    if tensor is None:
        return 0
    check_float_cpu(name, tensor)
    if tensor.dim() != 1 or tensor.numel() != channels or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous vector of {channels} elements, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def output_size(size: int, before: int, after: int, kernel: int, stride: int) -> int:
    """Pixels of the output along one dimension, at least 0."""
    return max(0, (size + before + after - kernel) // stride + 1)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue | None = None,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``act(scale * depthwise(x) + shift)``, and its mean over the pixels if ``pool``.

    Args:
        x: [N, C, H, W], float32, on the CPU, in channels-last strides.
        weight: [C, 1, k, k], float32, k in 3, 5, 7, any strides.
        stride: of both dimensions, at least 1.
        padding: zeros on the (left, right, top, bottom).
        epilogue: scale, shift and activation; a residual is not supported.
        pool: whether to return the mean as well.

    Returns:
        y [N, C, H_out, W_out] in channels-last strides, and the mean [N, C] or None.

    Raises:
        ValueError: for an argument outside of these.
    """
    check_float_cpu("x", x)
    check_float_cpu("weight", weight)
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"x: expected [N, C, H, W] in channels-last strides, got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1] if weight.dim() else 0
    if weight.shape != (channels, 1, kernel, kernel) or kernel not in KERNEL_SIZES:
        raise ValueError(f"weight: expected ({channels}, 1, k, k) with k in {KERNEL_SIZES}, got {tuple(weight.shape)}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    left, right, top, bottom = padding
    if left < 0 or right < 0 or top < 0 or bottom < 0:
        raise ValueError(f"padding: expected (left, right, top, bottom) of at least 0, got {padding}")
    epilogue = Epilogue() if epilogue is None else epilogue
    if epilogue.residual is not None:
        raise ValueError("epilogue.residual: expected None, got a tensor: a depthwise convolution adds no residual")
    act = ACTIVATION_INDEX.get(epilogue.act)
    if act is None:
        raise ValueError(f"epilogue.act: expected one of {ACTIVATIONS}, got {epilogue.act!r}")
    scale = vector("epilogue.scale", epilogue.scale, channels)
    shift = vector("epilogue.shift", epilogue.shift, channels)

    out_height = output_size(height, top, bottom, kernel, stride)
    out_width = output_size(width, left, right, kernel, stride)
    y = torch.empty((batch, channels, out_height, out_width), memory_format=torch.channels_last)
    pooled = torch.empty((batch, channels)) if pool else None
    if y.numel() == 0:
        # The mean of no pixels, as torch has it.
        return y, None if pooled is None else pooled.fill_(float("nan"))
    # Held by name until the call returns: the memory of a copy would be free again otherwise.
    weight = weight.contiguous()
    extension().depthwise_conv(
        x.data_ptr(),
        weight.data_ptr(),
        scale,
        shift,
        y.data_ptr(),
        0 if pooled is None else pooled.data_ptr(),
        batch,
        channels,
        height,
        width,
        out_height,
        out_width,
        kernel,
        stride,
        padding,
        act,
        torch.get_num_threads(),
    )
    return y, pooled
