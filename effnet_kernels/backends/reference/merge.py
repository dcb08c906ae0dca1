"""The end of an inverted residual block, in plain PyTorch."""

from torch import Tensor

from effnet_kernels.backends.reference.operands import apply_prologue
from effnet_kernels.fusion.spec import Prologue


def merge(x: Tensor, prologue: Prologue, residual: Tensor | None, keep: Tensor | None) -> Tensor:
    """``keep[n] * act(scale * x + shift) * gate + residual``: the output of the block, [N, C, H, W] in x's dtype.

    x and residual [N, C, H, W]; keep [N], the stochastic-depth factor of each sample (Huang et al. 2016, section 3).
    """
    y = apply_prologue(x, prologue)
    if keep is not None:
        y = y * keep.to(y.dtype)[:, None, None, None]
    return (y if residual is None else y + residual).to(x.dtype)
