"""EfficientNet, the same network, weights and numbers as everybody's, computed faster."""

from effnet_kernels.acceleration import accelerate, restore
from effnet_kernels.cpu import NativeExtensionWarning
from effnet_kernels.dispatch import BackendError, use_backend
from effnet_kernels.explain import explain
from effnet_kernels.freezing import freeze
from effnet_kernels.models import *  # noqa: F403
from effnet_kernels.models import __all__ as _models
from effnet_kernels.modules import (
    ConvBnAct,
    FusedMBConv,
    FusedMBConvConfig,
    MBConv,
    MBConvConfig,
    SqueezeExcitation,
    StochasticDepth,
)
from effnet_kernels.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConvBnAct",
    "FusedMBConv",
    "FusedMBConvConfig",
    "MBConv",
    "MBConvConfig",
    "NativeExtensionWarning",
    "SqueezeExcitation",
    "StochasticDepth",
    "accelerate",
    "explain",
    "freeze",
    "restore",
    "use_backend",
    "warmup",
]
__all__ += _models
