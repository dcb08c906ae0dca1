"""Statistics of a map that some other convolution has made."""

from torch import Tensor

from effnet_kernels import reference
from effnet_kernels.ops.checks import check_map


def channel_statistics(y: Tensor) -> Tensor:
    """Count, mean and M2 (sum of squared deviations) of each channel: y [N, C, H, W] to [3, C], fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype or shape that does not fit.
    """
    check_map(y)
    return reference.channel_statistics(y)
