"""The squeeze: a global average pool of a deferred activation."""

from torch import Tensor

from effnet_kernels import dispatch, reference
from effnet_kernels.deferred import Prologue
from effnet_kernels.operands import as_map
from effnet_kernels.ops.checks import any_requires_grad, check_map, check_prologue, contiguous, fits_kernels
from effnet_kernels.primitives import primitives_for


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool of a deferred activation: x [N, C, H, W] to [N, C] in fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Hu et al. 2018 (squeeze-and-excitation), equation 2.
    """
    check_map(x)
    check_prologue(prologue, x)
    if dispatch.has_kernels(x) and fits_kernels(x, prologue):
        from effnet_kernels.ops.functions import Squeeze

        x = as_map(x)
        scale, shift, act, gate, _ = owed = contiguous(prologue or Prologue())
        if not any_requires_grad(x, *owed):
            primitives = primitives_for(x)
            return primitives.mean_of_sums(primitives.squeeze(x, owed), x.shape[2] * x.shape[3])
        if gate is None:
            return Squeeze.apply(x, scale, shift, act)
    return reference.squeeze(x, prologue)
