"""Comparison of a kernel's results with the reference in float64."""

import torch
from conftest import TOLERANCES, relative_rms
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A random map [N, C, H, W] in channels-last strides."""
    x = torch.randn(*shape, device="cuda") * scale
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_accurate(actual: Tensor, exact: Tensor, same_dtype: Tensor | None = None) -> None:
    """float32 to its tolerance; lower precision to twice the error of torch in that dtype (or to its rounding).

    ``exact`` is the reference's result in float64, ``same_dtype`` what plain PyTorch makes of the same inputs in
    their own dtype.
    """
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} instead of {tuple(exact.shape)}"
    error = relative_rms(actual.cpu(), exact.cpu())
    if same_dtype is None:
        bound = TOLERANCES[torch.float32]
    else:
        bound = max(2 * relative_rms(same_dtype.cpu(), exact.cpu()), torch.finfo(same_dtype.dtype).eps)
    assert error <= bound, f"relative RMS error {error:.2e}, allowed {bound:.2e}"
