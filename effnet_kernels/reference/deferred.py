"""Paying the debt of a deferred activation, in plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.deferred import Activation, Epilogue, Gate, Prologue

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def activate(x: Tensor, act: Activation) -> Tensor:
    """``act(x)``, elementwise."""
    return _FUNCTIONS[act](x)


def gate_of(logits: Tensor, gate: Gate) -> Tensor:
    """Squeeze-and-excitation's gate, elementwise."""
    return torch.sigmoid(logits) if gate == "sigmoid" else F.hardsigmoid(logits)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics are kept in: fp32 for fp16, bf16 and fp32; fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pay(x: Tensor, prologue: Prologue | None) -> Tensor:
    """``act(scale * x + shift) * gate`` in the accumulation dtype: x [N, C, H, W], scale and shift [C], gate [N, C]."""
    x = x.to(accumulation_dtype(x.dtype))
    if prologue is None:
        return x
    x = activate(affine(x, *fold_statistics(prologue)), prologue.act)
    return x if prologue.gate is None else x * prologue.gate[:, :, None, None]


def finish(y: Tensor, epilogue: Epilogue | None, dtype: torch.dtype) -> Tensor:
    """``act(scale * y + shift) + residual``, rounded to ``dtype``: what a convolution stores."""
    if epilogue is not None:
        y = activate(affine(y, *fold_statistics(epilogue)), epilogue.act)
        if epilogue.residual is not None:
            y = y + epilogue.residual
    return y.to(dtype)


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``scale * x + shift`` by channel: x [N, C, H, W], scale and shift [C]."""
    if scale is not None and shift is not None:
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])
    if scale is not None:
        return x * scale[:, None, None]
    return x if shift is None else x + shift[:, None, None]


def fold_statistics(owed: Prologue | Epilogue) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, with the running statistics folded into them where there are any."""
    if owed.statistics is None:
        return owed.scale, owed.shift
    mean, var, eps = owed.statistics
    rstd = torch.rsqrt(var + eps)
    scale = rstd if owed.scale is None else rstd * owed.scale
    return scale, -mean * scale if owed.shift is None else owed.shift - mean * scale
