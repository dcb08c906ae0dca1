"""Each operator in plain, differentiable PyTorch: the definition of correct."""

from effnet_kernels.reference.convolution import depthwise_conv, pointwise_conv
from effnet_kernels.reference.merge import merge
from effnet_kernels.reference.squeeze_excite import excite, squeeze
from effnet_kernels.reference.statistics import channel_statistics, fold_batch_norm

__all__ = [
    "channel_statistics",
    "depthwise_conv",
    "excite",
    "fold_batch_norm",
    "merge",
    "pointwise_conv",
    "squeeze",
]
