"""The squeeze: a global average pool, with a prologue."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import Prologue
from effnet_kernels.ops.checks import any_requires_grad, check_map, check_prologue, contiguous, fits_kernels
from effnet_kernels.ops.functions import Squeeze


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool, with a prologue: x [N, C, H, W] to [N, C] in fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Hu et al. 2018 (squeeze-and-excitation), equation 2.
    """
    check_map(x)
    check_prologue(prologue, x)
    prologue = prologue or Prologue()
    recorded = any_requires_grad(x, *prologue)
    fits = fits_kernels(x, prologue) and not (recorded and prologue.gate is not None)
    backend = select.operator_backend(x) if fits else "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        x, prologue = as_map(x), contiguous(prologue)
        if recorded:
            return Squeeze.apply(primitives, x, *prologue[:3])
    return primitives.mean_of_sums(primitives.squeeze(x, prologue), x.shape[2] * x.shape[3])
