"""Statistics of a map that some other convolution has made."""

from torch import Tensor

from effnet_kernels import dispatch, reference
from effnet_kernels.operands import as_map
from effnet_kernels.ops.checks import any_requires_grad, check_map
from effnet_kernels.primitives import primitives_for


def channel_statistics(y: Tensor) -> Tensor:
    """Count, mean and M2 (sum of squared deviations) of each channel: y [N, C, H, W] to [3, C], fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype or shape that does not fit.
    """
    check_map(y)
    if dispatch.has_kernels(y) and not any_requires_grad(y):
        primitives = primitives_for(y)
        return primitives.merge_statistics(primitives.channel_statistics(as_map(y)))
    return reference.channel_statistics(y)
