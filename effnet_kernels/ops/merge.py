"""The end of a block: the debt paid, the stochastic-depth factor, the residual."""

from torch import Tensor

from effnet_kernels import reference
from effnet_kernels.deferred import Prologue
from effnet_kernels.ops.checks import check_map, check_prologue, check_shape


def merge(
    x: Tensor, prologue: Prologue | None = None, residual: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The output of a block: ``keep[n] * act(scale * x + shift) * gate + residual``, [N, C, H, W] in x's dtype.

    Args:
        x: [N, C, H, W], the raw output of the block's last convolution.
        prologue: what is owed to it.
        residual: [N, C, H, W], the block's input.
        keep: [N], the stochastic-depth factor of each sample: 0, or 1 / survival probability.

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Huang et al. 2016 (stochastic depth), section 3.
    """
    check_map(x)
    check_prologue(prologue, x)
    check_shape(residual, tuple(x.shape), "residual", x)
    check_shape(keep, (x.shape[0],), "keep", x)
    return reference.merge(x, prologue, residual, keep)
