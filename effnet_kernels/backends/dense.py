"""torch's dense convolution and its gradients, with a padding for each side, in channels-last strides."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.fusion.spec import Padding


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding) -> Tensor:
    """x [N, C, H, W], weight [K, C, k, k], bias [K] to [N, K, H', W'] in x's dtype."""
    if weight.dtype is torch.float64 and x.dtype is not torch.float64:
        raise ValueError(f"weight: expected the input's precision, {x.dtype}, got {weight.dtype}")
    x, symmetric = _padded(x, padding)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, symmetric).contiguous(memory_format=torch.channels_last)


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, plus ``residual``, and of the weight, from that of the output."""
    padded, symmetric = _padded(x, padding)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        dy,
        padded,
        weight.to(x.dtype),
        None,
        [stride] * 2,
        [symmetric] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [needs_input, needs_weight, False],
    )
    if grad_x is not None and padded is not x:
        left, _, top, _ = padding
        grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    if grad_x is not None:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
        grad_x = grad_x if residual is None else grad_x + residual
    return grad_x, grad_weight


def _padded(x: Tensor, padding: Padding) -> tuple[Tensor, int]:
    """The input of torch's convolution and the padding left to it, which is the same on all sides."""
    left, right, top, bottom = padding
    if left == right == top == bottom:
        return x, left
    return F.pad(x, [left, right, top, bottom]).contiguous(memory_format=torch.channels_last), 0
