"""Squeeze-and-excitation (Hu et al. 2018, section 3), in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.deferred import Activation, Prologue
from effnet_kernels.reference.deferred import activate, pay


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool of the deferred activation (equation 2): x [N, C, H, W] to [N, C], fp32 (fp64 for fp64)."""
    return pay(x, prologue).mean(dim=(2, 3))


def excite(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation = "silu"
) -> Tensor:
    """The gate ``sigmoid(w2 @ act(w1 @ pooled + b1) + b2)`` (equation 3).

    pooled [N, C], w1 [S, C] or [S, C, 1, 1], b1 [S], w2 [C, S] or [C, S, 1, 1], b2 [C]; the gate is [N, C].
    """
    w1, b1, w2, b2 = (None if t is None else t.to(pooled.dtype) for t in (w1.flatten(1), b1, w2.flatten(1), b2))
    assert w1 is not None
    assert w2 is not None
    return torch.sigmoid(F.linear(activate(F.linear(pooled, w1, b1), act), w2, b2))
