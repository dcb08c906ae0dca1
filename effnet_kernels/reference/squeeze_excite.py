"""Squeeze-and-excitation (Hu et al. 2018, section 3), in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.deferred import Activation, Gate, Prologue
from effnet_kernels.reference.deferred import activate, gate_of, pay


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool of the deferred activation (equation 2): x [N, C, H, W] to [N, C], fp32 (fp64 for fp64)."""
    return pay(x, prologue).mean(dim=(2, 3))


def excite(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation = "silu",
    gate: Gate = "sigmoid",
) -> Tensor:
    """The gate ``gate(w2 @ act(w1 @ pooled + b1) + b2)`` (equation 3).

    pooled [N, C], w1 [S, C] or [S, C, 1, 1], b1 [S], w2 [C, S] or [C, S, 1, 1], b2 [C]; the gate is [N, C].
    """
    squeezed = F.linear(pooled, *_in_dtype_of(pooled, w1, b1))
    return gate_of(F.linear(activate(squeezed, act), *_in_dtype_of(pooled, w2, b2)), gate)


def _in_dtype_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
