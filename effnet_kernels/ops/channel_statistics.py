"""The statistics of a map that any other convolution has made."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.ops.checks import any_requires_grad, check_map


def channel_statistics(y: Tensor) -> Tensor:
    """Count, mean and M2 (sum of squared deviations) of each channel: y [N, C, H, W] to [3, C], fp32 (fp64 for fp64).

    Raises TypeError or ValueError for a dtype or shape that does not fit.
    """
    check_map(y)
    backend = "reference" if any_requires_grad(y) else select.operator_backend(y)
    primitives = primitives_of(backend)
    return primitives.merge_statistics(primitives.channel_statistics(y if backend == "reference" else as_map(y)))
