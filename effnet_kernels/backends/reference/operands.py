"""The prologue, the epilogue and the output's gradient, which a primitive applies to its operands and its result."""

import torch
from torch import Tensor

from effnet_kernels.backends.activation import activate, activation_backward
from effnet_kernels.backends.batch_norm import scale_and_shift
from effnet_kernels.fusion.spec import Epilogue, OutputGradient, Prologue, accumulation_dtype


def by_channel(v: Tensor) -> Tensor:
    """A vector [C] or [N, C] in a shape that broadcasts against a map [N, C, H, W]."""
    return v[:, None, None] if v.dim() == 1 else v[:, :, None, None]


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``scale * x + shift``: x [N, C, H, W], scale and shift [C]."""
    if scale is not None and shift is not None:
        return torch.addcmul(by_channel(shift), x, by_channel(scale))
    if scale is not None:
        return x * by_channel(scale)
    return x if shift is None else x + by_channel(shift)


def normalized(x: Tensor, part: Prologue | Epilogue | OutputGradient) -> Tensor:
    """The activation's input in a prologue, an epilogue or an output's gradient, in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    if isinstance(part, OutputGradient) or part.statistics is None:
        return affine(x, part.scale, part.shift)
    mean, var, eps = part.statistics
    return affine(x, *scale_and_shift(mean, torch.rsqrt(var + eps), part.scale, part.shift))


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """``act(scale * x + shift) * gate`` in the accumulation dtype: x [N, C, H, W], scale and shift [C], gate [N, C]."""
    u = activate(normalized(x, prologue), prologue.act)
    return u if prologue.gate is None else u * by_channel(prologue.gate)


def apply_epilogue(y: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """``act(scale * y + shift) + residual``, rounded to ``dtype``: what a convolution stores."""
    y = activate(normalized(y, epilogue), epilogue.act)
    return (y if epilogue.residual is None else y + epilogue.residual).to(dtype)


def norm_gradient(gradient: OutputGradient) -> Tensor:
    """``dz`` of an :class:`~effnet_kernels.fusion.spec.OutputGradient`, [N, C, H, W] in the accumulation dtype."""
    like = gradient.grad if gradient.grad is not None else gradient.y
    assert like is not None
    dtype = accumulation_dtype(like.dtype)
    dz = torch.zeros_like(like, dtype=dtype) if gradient.grad is None else gradient.grad.to(dtype)
    dz = dz if gradient.gate is None else dz * by_channel(gradient.gate)
    dz = dz if gradient.drop_path_scale is None else dz * gradient.drop_path_scale[:, None, None, None]
    dz = dz if gradient.offset is None else dz + by_channel(gradient.offset)
    if gradient.act == "none":
        return dz
    assert gradient.y is not None
    return activation_backward(dz, normalized(gradient.y, gradient), gradient.act)


def output_gradient(gradient: OutputGradient) -> Tensor:
    """``dy`` of an :class:`~effnet_kernels.fusion.spec.OutputGradient`, [N, C, H, W] in the accumulation dtype."""
    dz = norm_gradient(gradient)
    if gradient.coefficients is None:
        return dz
    assert gradient.y is not None
    alpha, beta, gamma = map(by_channel, gradient.coefficients)
    return alpha * dz + beta * gradient.y + gamma


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of a convolution: rounded to the dtype of the maps, for sums in the accumulation dtype."""
    return t.to(dtype).to(accumulation_dtype(dtype))
