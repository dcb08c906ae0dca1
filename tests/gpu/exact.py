"""The primitives of the blocks in plain PyTorch, as their equations have them: what the kernels are tested against.

Every function has its kernel's name, arguments and results, with partial results as a single partial.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.reference.deferred import activate, finish, pay
from gpu.compare import assert_accurate


def compare(actual: Any, function: Callable[..., Any], dtype: torch.dtype, *arguments: Any) -> None:
    """Each tensor of ``actual`` against ``function`` of the arguments in float64, and in ``dtype`` for what is fair."""
    with torch.no_grad():
        exact = function(*cast(arguments, torch.float64))
        alike = function(*cast(arguments, dtype)) if dtype != torch.float32 else None
    if isinstance(actual, Tensor):
        actual, exact, alike = (actual,), (exact,), (alike,)
    alike = (None,) * len(exact) if alike is None else alike
    for ours, right, same in zip(actual, exact, alike, strict=True):
        assert (ours is None) == (right is None)
        if ours is not None:
            assert_accurate(ours, right, same)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, tuple):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def by_channel(v: Tensor) -> Tensor:
    """[C] or [N, C] against a map."""
    return v[:, None, None] if v.dim() == 1 else v[:, :, None, None]


def derivative(z: Tensor, act: str) -> Tensor:
    one, aten = torch.ones_like(z), torch.ops.aten
    backward = {
        "none": lambda: one,
        "silu": lambda: aten.silu_backward(one, z),
        "relu": lambda: aten.threshold_backward(one, z, 0),
        "relu6": lambda: aten.hardtanh_backward(one, z, 0, 6),
        "hardswish": lambda: aten.hardswish_backward(one, z),
    }
    return backward[act]()


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if scale is None else x * by_channel(scale)
    return x if shift is None else x + by_channel(shift)


def moments(y: Tensor) -> Tensor:
    mean = y.mean(dim=(0, 2, 3))
    count = torch.full_like(mean, y.numel() / y.shape[1])
    return torch.stack([count, mean, (y - by_channel(mean)).square().sum(dim=(0, 2, 3))])


def dz(gradient) -> Tensor:
    like = gradient.grad if gradient.grad is not None else gradient.y
    out = torch.zeros_like(like) if gradient.grad is None else gradient.grad
    out = out if gradient.gate is None else out * by_channel(gradient.gate)
    out = out if gradient.keep is None else out * gradient.keep[:, None, None, None]
    out = out if gradient.offset is None else out + by_channel(gradient.offset)
    if gradient.act != "none":
        out = out * derivative(affine(gradient.y, gradient.scale, gradient.shift), gradient.act)
    return out


def dy(gradient) -> Tensor:
    if gradient.coefficients is None:
        return dz(gradient)
    alpha, beta, gamma = gradient.coefficients
    return by_channel(alpha) * dz(gradient) + by_channel(beta) * gradient.y + by_channel(gamma)


def reduced(y: Tensor, reduction: str) -> Tensor | None:
    if reduction == "statistics":
        return moments(y)
    return y.sum(dim=(2, 3)) if reduction == "pool" else None


def pointwise_conv(x, weight, bias, prologue, epilogue, reduction):
    y = F.conv2d(pay(x, prologue).to(x.dtype), weight, bias)
    y = finish(y, epilogue, x.dtype)
    return (None if reduction == "pool" else y), reduced(y, reduction)


def depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction):
    y = F.conv2d(F.pad(pay(x, prologue).to(x.dtype), padding), weight, None, stride, groups=x.shape[1])
    y = finish(y, epilogue, x.dtype)
    return y, reduced(y, reduction)


def pointwise_conv_backward_data(gradient, weight, x, prologue, mean, residual, through):
    dq, sums = torch.einsum("nkhw,kc->nchw", dy(gradient), weight.flatten(1)), None
    if x is not None:
        z = affine(x, prologue.scale, prologue.shift)
        u, s, centred = activate(z, prologue.act), derivative(z, prologue.act), x - by_channel(mean)
        products = (dq * u, dq * s, s, dq * s * centred, s * centred)
        sums = torch.stack([product.sum(dim=(2, 3)) for product in products], dim=1)
        if through:
            dq = dq * s if prologue.gate is None else dq * s * by_channel(prologue.gate)
    return (dq if residual is None else dq + residual), sums


def pointwise_conv_backward_weight(gradient, x, prologue):
    return torch.einsum("nkhw,nchw->kc", dy(gradient), pay(x, prologue).to(x.dtype))[:, :, None, None]


def depthwise_conv_backward(gradient, x, weight, stride, padding, prologue, mean, residual):
    z = affine(x, prologue.scale, prologue.shift)
    u = F.pad(activate(z, prologue.act), padding)
    options = (None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], x.shape[1], [True, True, False])
    du, dweight, _ = torch.ops.aten.convolution_backward(dy(gradient), u, weight, *options)
    du = F.pad(du, [-p for p in padding])
    out, sums = du * derivative(z, prologue.act), None
    if mean is not None:
        sums = torch.stack([out.sum(dim=(0, 2, 3)), (out * (x - by_channel(mean))).sum(dim=(0, 2, 3))])
    return (out if residual is None else out + residual), sums, dweight


def fold_batch_norm(stats, weight, bias, running_mean, running_var, momentum, eps):
    """Scale, shift, mean, rstd and the running statistics afterwards."""
    count, mean, m2 = stats
    rstd = torch.rsqrt(m2 / count + eps)
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    moved = (running_mean + momentum * (mean - running_mean), running_var + momentum * (m2 / (count - 1) - running_var))
    return scale, shift, mean, rstd, *moved


def fold_batch_norm_backward(sums, count, weight, mean, rstd, batch_statistics):
    total, centred = sums
    alpha = rstd if weight is None else rstd * weight
    beta = -alpha * rstd**2 * centred / count if batch_statistics else torch.zeros_like(alpha)
    gamma = -alpha * total / count - beta * mean if batch_statistics else torch.zeros_like(alpha)
    return torch.stack([alpha, beta, gamma]), rstd * centred, total


def gradient_sums(gradient, mean):
    out = dz(gradient)
    return torch.stack([out.sum(dim=(0, 2, 3)), (out * (gradient.y - by_channel(mean))).sum(dim=(0, 2, 3))])


def apply_gradient(gradient, residual):
    return dy(gradient) if residual is None else dy(gradient) + residual


def squeeze(x, prologue, factor):
    u = pay(x, prologue)
    return (u if factor is None else u * factor).sum(dim=(2, 3))


def excite(sums, count, w1, b1, w2, b2, act, kind):
    pooled = sums / count
    hidden = F.linear(pooled, w1.flatten(1), b1)
    logits = F.linear(activate(hidden, act), w2.flatten(1), b2)
    return torch.sigmoid(logits) if kind == "sigmoid" else F.hardsigmoid(logits), pooled, hidden


def excite_backward(sums, count, gate, hidden, w1, w2, act, kind):
    t = sums.unbind(dim=1)
    logits = t[0] * (gate * (1 - gate) if kind == "sigmoid" else torch.where((gate > 0) & (gate < 1), 1 / 6, 0.0))
    dhidden = (logits @ w2.flatten(1)) * derivative(hidden, act)
    offset = dhidden @ w1.flatten(1) / count
    norm_sums = torch.stack([gate * t[1] + offset * t[2], gate * t[3] + offset * t[4]], dim=1) if len(t) == 5 else None
    return offset, logits, dhidden, norm_sums


def excite_backward_weight(logits, dhidden, hidden, pooled, act):
    return dhidden.T @ pooled, dhidden.sum(dim=0), logits.T @ activate(hidden, act), logits.sum(dim=0)


def merge(x, prologue, residual, keep):
    y = pay(x, prologue)
    y = y if keep is None else y * keep[:, None, None, None]
    return (y if residual is None else y + residual).to(x.dtype)
