"""The squeeze: a global average pool of a deferred activation."""

from torch import Tensor

from effnet_kernels import reference
from effnet_kernels.deferred import Prologue
from effnet_kernels.ops.checks import check_map, check_prologue


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool of a deferred activation: x [N, C, H, W] to [N, C] in fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Hu et al. 2018 (squeeze-and-excitation), equation 2.
    """
    check_map(x)
    check_prologue(prologue, x)
    return reference.squeeze(x, prologue)
