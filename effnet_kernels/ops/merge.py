"""The end of a block: its last norm, the stochastic-depth factor, the residual."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import Prologue
from effnet_kernels.ops.checks import (
    any_requires_grad,
    check_map,
    check_prologue,
    check_shape,
    contiguous,
    fits_kernels,
)
from effnet_kernels.ops.functions import Merge


def merge(
    x: Tensor, prologue: Prologue | None = None, residual: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The output of a block: ``keep[n] * act(scale * x + shift) * gate + residual``, [N, C, H, W] in x's dtype.

    Args:
        x: [N, C, H, W], the raw output of the block's last convolution.
        prologue: what is applied to it on load.
        residual: [N, C, H, W], the block's input.
        keep: [N], the stochastic-depth factor of each sample: 0, or 1 / survival probability.

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Huang et al. 2016 (stochastic depth), section 3.
    """
    check_map(x)
    check_prologue(prologue, x)
    check_shape(residual, tuple(x.shape), "residual", x)
    check_shape(keep, (x.shape[0],), "keep", x)
    prologue = prologue or Prologue()
    recorded = any_requires_grad(x, residual, keep, *prologue)
    fits = fits_kernels(x, prologue, None, residual, keep)
    if recorded and (prologue.gate is not None or any_requires_grad(keep)):
        fits = False
    backend = select.operator_backend(x) if fits else "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        x, residual = as_map(x), None if residual is None else as_map(residual)
        keep, prologue = None if keep is None else as_contiguous(keep), contiguous(prologue)
        if recorded:
            scale, shift, act, _, _ = prologue
            return Merge.apply(primitives, x, scale, shift, residual, keep, act)
    return primitives.merge(x, prologue, residual, keep)
