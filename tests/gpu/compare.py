"""Comparison of a kernel's results with the reference in float64."""

from collections.abc import Callable
from typing import Any

import torch
from conftest import TOLERANCES, relative_rms
from torch import Tensor

from effnet_kernels.backends.reference import primitives as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A random map [N, C, H, W] in channels-last strides."""
    x = torch.randn(*shape, device="cuda") * scale
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_accurate(actual: Tensor, exact: Tensor, same_dtype: Tensor | None = None) -> None:
    """float32 to its tolerance; lower precision to twice the error of torch in that dtype (or to its rounding).

    ``exact`` is the reference's result in float64, ``same_dtype`` plain PyTorch's for the same inputs in their own
    dtype.
    """
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} instead of {tuple(exact.shape)}"
    error = relative_rms(actual.cpu(), exact.cpu())
    if same_dtype is None:
        bound = TOLERANCES[torch.float32]
    else:
        bound = max(2 * relative_rms(same_dtype.cpu(), exact.cpu()), torch.finfo(same_dtype.dtype).eps)
    assert error <= bound, f"relative RMS error {error:.2e}, allowed {bound:.2e}"


def compare(actual: Any, primitive: Callable[..., Any], *arguments: Any, dtype: torch.dtype = torch.float32) -> None:
    """Compares each tensor of ``actual`` with a primitive of the reference in float64.

    For maps of lower precision the reference in that ``dtype`` says how large errors may be.
    """
    with torch.no_grad():
        exact = primitive(*cast(arguments, torch.float64))
        same_dtype = primitive(*arguments) if dtype != torch.float32 else None
    if isinstance(actual, Tensor):
        actual, exact, same_dtype = (actual,), (exact,), (same_dtype,)
    same_dtype = (None,) * len(exact) if same_dtype is None else same_dtype
    for ours, right, same in zip(actual, exact, same_dtype, strict=True):
        assert (ours is None) == (right is None)
        if ours is not None:
            assert_accurate(ours, right, same)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with every floating-point tensor in it in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def finalize_and_move(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result of the reference's ``finalize_batch_norm``, and the running statistics after it."""
    partials, weight, bias, mean, var, *rest = arguments
    mean, var = mean.clone(), var.clone()
    return reference.finalize_batch_norm(partials, weight, bias, mean, var, *rest), mean, var


def moments(y: Tensor) -> Tensor:
    """Count, mean and M2 of each channel of a map, [3, C], in float64."""
    return reference.channel_statistics(y.double())[0]
