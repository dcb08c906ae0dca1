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
from effnet_kernels.ops.functions import BnActAdd


def bn_act_add(
    x: Tensor, prologue: Prologue | None = None, residual: Tensor | None = None, drop_path_scale: Tensor | None = None
) -> Tensor:
    """The output of a block: ``drop_path_scale[n] * act(scale * x + shift) * gate + residual``, in x's dtype.

    Args:
        x: [N, C, H, W], the raw output of the block's last convolution.
        prologue: applied to it on load.
        residual: [N, C, H, W], the block's input.
        drop_path_scale: [N], the stochastic-depth factor of each sample: 0, or 1 / survival probability.

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Huang et al. 2016 (stochastic depth), section 3.
    """
    check_map(x)
    check_prologue(prologue, x)
    check_shape(residual, tuple(x.shape), "residual", x)
    check_shape(drop_path_scale, (x.shape[0],), "drop_path_scale", x)
    prologue = prologue or Prologue()
    recorded = any_requires_grad(x, residual, drop_path_scale, *prologue)
    fits = fits_kernels(x, prologue, None, residual, drop_path_scale)
    if recorded and (prologue.gate is not None or any_requires_grad(drop_path_scale)):
        fits = False
    backend = select.operator_backend(x) if fits else "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        x, residual = as_map(x), None if residual is None else as_map(residual)
        drop_path_scale = None if drop_path_scale is None else as_contiguous(drop_path_scale)
        prologue = contiguous(prologue)
        if recorded:
            scale, shift, act, _, _ = prologue
            return BnActAdd.apply(primitives, x, scale, shift, residual, drop_path_scale, act)
    return primitives.bn_act_add(x, prologue, residual, drop_path_scale)
