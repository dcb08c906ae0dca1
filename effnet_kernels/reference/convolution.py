"""The two convolutions of an inverted residual block, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.deferred import Epilogue, Padding, Prologue, Reduction
from effnet_kernels.reference.deferred import accumulation_dtype, finish, pay
from effnet_kernels.reference.statistics import channel_statistics


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """1x1 convolution: x [N, C, H, W], weight [K, C, 1, 1], bias [K] to y [N, K, H, W].

    Returns ``(y, None)``; with ``reduction="statistics"`` ``(y, stats [3, K])``; with ``"pool"`` the spatial mean
    instead of the map, ``(pooled [N, K], None)``.
    """
    dtype = accumulation_dtype(x.dtype)
    y = F.conv2d(pay(x, prologue), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = finish(y, epilogue, x.dtype)
    if reduction == "pool":
        return y.to(dtype).mean(dim=(2, 3)), None
    return y, channel_statistics(y) if reduction == "statistics" else None


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """k x k depthwise convolution: x [N, C, H, W], weight [C, 1, k, k] to y [N, C, H', W'].

    The padding, (left, right, top, bottom), is of zeros after the prologue. Returns ``(y, None)``; with
    ``reduction="statistics"`` ``(y, stats [3, C])``; with ``"pool"`` ``(y, pooled [N, C])``, the spatial mean of y.
    """
    dtype = accumulation_dtype(x.dtype)
    y = F.conv2d(F.pad(pay(x, prologue), padding), weight.to(dtype), stride=stride, groups=x.shape[1])
    y = finish(y, epilogue, x.dtype)
    if reduction == "pool":
        return y, y.to(dtype).mean(dim=(2, 3))
    return y, channel_statistics(y) if reduction == "statistics" else None
