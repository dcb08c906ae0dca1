"""The end of an inverted residual block, in plain PyTorch."""

from torch import Tensor

from effnet_kernels.backends.reference.operands import apply_prologue
from effnet_kernels.fusion.spec import Prologue


def bn_act_add(x: Tensor, prologue: Prologue, residual: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    """``drop_path_scale[n] * act(scale * x + shift) * gate + residual``: the output of the block, in x's dtype.

    x and residual [N, C, H, W], to the same; drop_path_scale [N], stochastic depth's factor of each sample (Huang et
    al. 2016, section 3).
    """
    y = apply_prologue(x, prologue)
    if drop_path_scale is not None:
        y = y * drop_path_scale.to(y.dtype)[:, None, None, None]
    return (y if residual is None else y + residual).to(x.dtype)
