"""The convolutions, forward and backward, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.backends.activation import activate, activation_backward
from effnet_kernels.backends.reference.batch_norm import channel_statistics
from effnet_kernels.backends.reference.operands import (
    apply_epilogue,
    apply_prologue,
    by_channel,
    normalized,
    output_gradient,
    rounded,
)
from effnet_kernels.fusion.spec import (
    SUMS_OF_GRADIENT,
    Epilogue,
    OutputGradient,
    Padding,
    PixelSums,
    Prologue,
    Reduction,
    accumulation_dtype,
)


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, prologue: Prologue, epilogue: Epilogue, reduction: Reduction
) -> tuple[Tensor | None, Tensor | None]:
    """x [N, C, H, W], weight [K, C, 1, 1], bias [K] to ``(y [N, K, H, W], None)``.

    With "statistics" the second is (count, mean, M2) of the stored values, [1, 3, K]; with "pool" the map is not
    returned, and the second is the sums of the finished values over each image's pixels, [N, 1, K].
    """
    u = rounded(apply_prologue(x, prologue), x.dtype)
    y = apply_epilogue(_convolve(u, weight, bias, x.dtype), epilogue, x.dtype)
    return (None if reduction == "pool" else y), _reduce(y, reduction)


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
    """The gradients of the input behind the prologue, [N, C, H, W], plus ``residual``, and of the weight, [K, C, 1, 1].

    With ``mean``, of the raw input ``x`` whose activation ``prologue`` describes (u the activated value, u' its
    derivative, dq the gradient of the gated u), the second result is the :class:`PixelSums` of each image in one
    tensor, [N, 1, 5, C]. Returned is dq, or with ``apply_act_grad`` gate * dq * u', and the sums without the slopes,
    [N, 1, 3, C].
    """
    dy = rounded(output_gradient(gradient), x.dtype)
    dx, sums, dweight = None, None, None
    if needs_weight:
        u = rounded(apply_prologue(x, prologue), x.dtype)
        dweight = torch.einsum("nkhw,nchw->kc", dy, u)[:, :, None, None]
    if needs_input:
        dx = torch.einsum("nkhw,kc->nchw", dy, rounded(weight, x.dtype).flatten(1))
        if mean is not None:
            z = normalized(x, prologue)
            u, s = activate(z, prologue.act), activation_backward(torch.ones_like(z), z, prologue.act)
            centred = x - by_channel(mean)
            products = PixelSums(
                grad_gate=dx * u, grad_shift=dx * s, grad_scale=dx * s * centred, slope=s, centred_slope=s * centred
            )
            sums = torch.stack([product.sum(dim=(2, 3)) for product in products], dim=1)[:, None]
            if apply_act_grad:
                sums = sums[:, :, SUMS_OF_GRADIENT]
                dx = dx * s if prologue.gate is None else dx * s * by_channel(prologue.gate)
        dx = _stored(dx, residual, x)
    return dx, sums, dweight


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    prologue: Prologue,
    epilogue: Epilogue,
    reduction: Reduction,
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [C, 1, k, k] to y [N, C, H', W'].

    The second is (count, mean, M2) of the stored values [1, 3, C] with "statistics", or the sums of them over each
    image's pixels [N, 1, C] with "pool". The padding is of zeros after the prologue.
    """
    u = rounded(apply_prologue(x, prologue), x.dtype)
    y = _convolve(u, weight, None, x.dtype, stride, padding, groups=x.shape[1])
    y = apply_epilogue(y, epilogue, x.dtype)
    return y, _reduce(y, reduction)


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
    """The gradients of ``scale * x + shift`` (of x, plus ``residual``, where the prologue is empty) and of the weight.

    dz [N, C, H, W], with ``mean`` [C] the sums [1, 2, C] of dz and dz * (x - mean), and dweight [C, 1, k, k].
    """
    dy, u = rounded(output_gradient(gradient), x.dtype), rounded(apply_prologue(x, prologue), x.dtype)
    du, dweight = _convolve_backward(dy, u, weight, x.dtype, stride, padding, groups=x.shape[1])
    dz, sums = activation_backward(du, normalized(x, prologue), prologue.act), None
    if mean is not None:
        products = (dz, dz * (x - by_channel(mean)))
        sums = torch.stack([product.sum(dim=(0, 2, 3)) for product in products])[None]
    return _stored(dz, residual, x), sums, dweight


def dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [K, C, k, k], bias [K] to y [N, K, H', W'], and statistics [1, 3, K] of it."""
    y = _convolve(rounded(x, x.dtype), weight, bias, x.dtype, stride, padding).to(x.dtype)
    return y, _reduce(y, reduction)


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
    """The gradients of x, plus ``residual``, and of the weight."""
    dy = rounded(output_gradient(gradient), x.dtype)
    dx, dweight = _convolve_backward(dy, rounded(x, x.dtype), weight, x.dtype, stride, padding)
    return _stored(dx, residual, x) if needs_input else None, dweight if needs_weight else None


def _convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    groups: int = 1,
) -> Tensor:
    bias = None if bias is None else bias.to(u.dtype)
    return F.conv2d(F.pad(u, padding), rounded(weight, dtype), bias, stride, groups=groups)


def _convolve_backward(
    dy: Tensor, u: Tensor, weight: Tensor, dtype: torch.dtype, stride: int, padding: Padding, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and the weight of :func:`_convolve`, by autograd's own formula."""
    du, dweight, _ = torch.ops.aten.convolution_backward(
        dy,
        F.pad(u, padding),
        rounded(weight, dtype),
        None,
        [stride] * 2,
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        groups,
        [True, True, False],
    )
    return F.pad(du, [-side for side in padding]), dweight


def _reduce(y: Tensor, reduction: Reduction) -> Tensor | None:
    if reduction == "statistics":
        return channel_statistics(y)
    return y.to(accumulation_dtype(y.dtype)).sum(dim=(2, 3))[:, None] if reduction == "pool" else None


def _stored(grad: Tensor, residual: Tensor | None, x: Tensor) -> Tensor:
    grad = grad if residual is None else grad + residual
    return grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
