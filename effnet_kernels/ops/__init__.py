"""The operators that the whole network is made of, each with its gradients.

An operator applies a :class:`Prologue` to its input on load, and an :class:`Epilogue` to its output before the store.
"""

from effnet_kernels.fusion.spec import Epilogue, Prologue
from effnet_kernels.ops.bn_act_add import bn_act_add
from effnet_kernels.ops.channel_statistics import channel_statistics
from effnet_kernels.ops.depthwise_conv import depthwise_conv
from effnet_kernels.ops.depthwise_conv_bn_silu import depthwise_conv_bn_silu
from effnet_kernels.ops.excite import excite
from effnet_kernels.ops.finalize_batch_norm import finalize_batch_norm
from effnet_kernels.ops.pointwise_conv import pointwise_conv
from effnet_kernels.ops.squeeze import squeeze
from effnet_kernels.ops.squeeze_excite import squeeze_excite

__all__ = [
    "Epilogue",
    "Prologue",
    "bn_act_add",
    "channel_statistics",
    "depthwise_conv",
    "depthwise_conv_bn_silu",
    "excite",
    "finalize_batch_norm",
    "pointwise_conv",
    "squeeze",
    "squeeze_excite",
]
