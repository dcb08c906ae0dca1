"""The squeeze: a global average pool of a deferred activation."""

import torch
from torch import Tensor

from effnet_kernels import dispatch, reference
from effnet_kernels.deferred import Prologue
from effnet_kernels.ops.checks import any_requires_grad, check_map, check_prologue, fits_triton


def squeeze(x: Tensor, prologue: Prologue | None = None) -> Tensor:
    """Global average pool of a deferred activation: x [N, C, H, W] to [N, C] in fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype, shape or device that does not fit.
    Source: Hu et al. 2018 (squeeze-and-excitation), equation 2.
    """
    check_map(x)
    check_prologue(prologue, x)
    if dispatch.runs_on_triton(x) and fits_triton(x, prologue):
        from effnet_kernels.ops.triton_functions import Squeeze
        from effnet_kernels.triton import squeeze_excite

        x = x.contiguous(memory_format=torch.channels_last)
        scale, shift, act, gate, _ = owed = prologue or Prologue()
        if not any_requires_grad(x, *owed):
            return squeeze_excite.mean_of_sums(squeeze_excite.squeeze(x, owed), x.shape[2] * x.shape[3])
        if gate is None:
            return Squeeze.apply(x, scale, shift, act)
    return reference.squeeze(x, prologue)
