"""Pointwise convolution on the CPU at inference: torch's GEMM with everything around it folded in."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.deferred import Activation, Epilogue

_IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": partial(F.silu, inplace=True),
    "relu": F.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
}


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, epilogue: Epilogue) -> Tensor:
    """``act(scale * (weight @ (x * gate) + bias) + shift) + residual``.

    Args:
        x: [N, C, H, W], float32, in channels-last strides.
        weight: [K, C, 1, 1]; bias: [K].
        gate: [N, C], on load.
        epilogue: applied to the output.

    Returns [N, K, H, W] in channels-last strides.
    """
    samples, channels, height, width = x.shape
    scale, shift = epilogue.scale, epilogue.shift
    if gate is not None:
        if samples == 1 and weight.shape[0] < height * width:
            weight = weight * gate[:, :, None, None]
        else:
            x = x * gate[:, :, None, None]
    # A pass over the weights costs K * C, one over the output N * H * W * K.
    if scale is not None and channels <= samples * height * width:
        weight, bias, scale = weight * scale[:, None, None, None], None if bias is None else bias * scale, None
    if scale is None and shift is not None:
        bias, shift = shift if bias is None else bias + shift, None
    # In channels-last strides the pixels are the rows of one matrix.
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if scale is not None:
        y.mul_(scale[:, None, None])
    if shift is not None:
        y.add_(shift[:, None, None])
    y = _IN_PLACE[epilogue.act](y)
    return y if epilogue.residual is None else y.add_(epilogue.residual)
