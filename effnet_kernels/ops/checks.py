"""Checks of operator arguments, and the errors that name what was expected and what came."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.fusion.spec import ACTIVATIONS, Epilogue, Prologue, Reduction, RunningStatistics

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(t: object, name: str, layout: str) -> None:
    """A tensor of a floating dtype, with the dimensions of a layout such as ``"[N, C]"``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor {layout}, got {type(t).__name__}")
    rank = layout.count(",") + 1
    if t.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(t.shape)}")
    check_dtype(t, name)


def check_dtype(t: Tensor, name: str) -> None:
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")


def check_map(x: object) -> None:
    """An activation map: [N, C, H, W] of a floating dtype."""
    check_tensor(x, "x", "[N, C, H, W]")


def check_shape(t: Tensor | None, shape: tuple[int, ...], name: str, like: Tensor) -> None:
    """A parameter or vector of a floating dtype and exactly this shape on the device of ``like``; None passes."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor of shape {shape}, got {type(t).__name__}")
    check_dtype(t, name)
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, where the input is, got {t.device}")


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_prologue(prologue: Prologue | None, x: Tensor) -> None:
    if prologue is not None:
        samples, channels = x.shape[:2]
        check_shape(prologue.scale, (channels,), "prologue.scale", x)
        check_shape(prologue.shift, (channels,), "prologue.shift", x)
        check_shape(prologue.gate, (samples, channels), "prologue.gate", x)
        _check_statistics(prologue.statistics, channels, "prologue", x)
        check_choice(prologue.act, ACTIVATIONS, "act")


def check_epilogue(epilogue: Epilogue | None, x: Tensor, output_shape: tuple[int, int, int, int]) -> None:
    if epilogue is not None:
        check_shape(epilogue.scale, output_shape[1:2], "epilogue.scale", x)
        check_shape(epilogue.shift, output_shape[1:2], "epilogue.shift", x)
        check_shape(epilogue.residual, output_shape, "epilogue.residual", x)
        _check_statistics(epilogue.statistics, output_shape[1], "epilogue", x)
        check_choice(epilogue.act, ACTIVATIONS, "act")


def _check_statistics(statistics: RunningStatistics | None, channels: int, owner: str, like: Tensor) -> None:
    if statistics is not None:
        check_shape(statistics.mean, (channels,), f"{owner}.statistics.mean", like)
        check_shape(statistics.var, (channels,), f"{owner}.statistics.var", like)


def any_requires_grad(*tensors: object) -> bool:
    """Whether autograd would record a call on these tensors."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def fits_kernels(
    x: Tensor, prologue: Prologue | None, epilogue: Epilogue | None = None, *parameters: Tensor | None
) -> bool:
    """Whether the kernels take these operands; where gradients are needed, no epilogue or running statistics.

    On the CPU all are float32; beside a GPU's maps of lower precision vectors and weights may be float32.
    """
    parts = [*(prologue or ()), *((prologue and prologue.statistics) or ())]
    parts += [*(epilogue or ()), *((epilogue and epilogue.statistics) or ())]
    vectors = [t for t in (*parts, *parameters) if isinstance(t, Tensor)]
    if any(t.dtype != torch.float32 if x.device.type == "cpu" else t.dtype == torch.float64 for t in vectors):
        return False
    if not any_requires_grad(x, *vectors):
        return True
    return epilogue is None and (prologue is None or prologue.statistics is None)


def fits_reduction(reduction: Reduction, x: Tensor, residual: Tensor | None, *parameters: object) -> bool:
    """Whether the kernels reduce an output as asked: pooled without gradients, and nothing beside a residual."""
    return reduction == "none" or (
        residual is None and (reduction == "statistics" or not any_requires_grad(x, *parameters))
    )


Parts = TypeVar("Parts", Prologue, Epilogue)


def contiguous(parts: Parts) -> Parts:
    """A prologue or an epilogue with its vectors contiguous, and a residual in channels-last strides."""
    if parts.statistics is not None:
        mean, var, eps = parts.statistics
        parts = parts._replace(statistics=RunningStatistics(as_contiguous(mean), as_contiguous(var), eps))
    replaced: dict[str, Any] = {
        name: as_map(t) if t.dim() == 4 else as_contiguous(t)
        for name, t in zip(parts._fields, parts, strict=True)
        if isinstance(t, Tensor)
    }
    return parts._replace(**replaced)
