"""The primitives of :class:`effnet_kernels.backends.base.Primitives` on the native CPU kernels."""

from effnet_kernels.backends.cpu.batch_norm import (
    apply_gradient,
    channel_statistics,
    finalize_batch_norm,
    finalize_batch_norm_backward,
    gradient_sums,
    merge_statistics,
)
from effnet_kernels.backends.cpu.bn_act_add import bn_act_add
from effnet_kernels.backends.cpu.dense import dense_conv, dense_conv_backward
from effnet_kernels.backends.cpu.depthwise import depthwise_conv, depthwise_conv_backward
from effnet_kernels.backends.cpu.pointwise import pointwise_conv, pointwise_conv_backward
from effnet_kernels.backends.cpu.squeeze_excite import (
    excite,
    excite_backward,
    excite_backward_weight,
    mean_of_sums,
    squeeze,
    squeeze_for_backward,
)

__all__ = [
    "apply_gradient",
    "bn_act_add",
    "channel_statistics",
    "dense_conv",
    "dense_conv_backward",
    "depthwise_conv",
    "depthwise_conv_backward",
    "excite",
    "excite_backward",
    "excite_backward_weight",
    "finalize_batch_norm",
    "finalize_batch_norm_backward",
    "gradient_sums",
    "mean_of_sums",
    "merge_statistics",
    "pointwise_conv",
    "pointwise_conv_backward",
    "squeeze",
    "squeeze_for_backward",
]
