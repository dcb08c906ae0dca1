"""EfficientNet, the same network, weights and numbers as everybody's, computed faster."""

from effnet_kernels.backends.cpu import NativeExtensionWarning, release_memory
from effnet_kernels.backends.select import BackendError, use_backend
from effnet_kernels.inference.freeze import freeze
from effnet_kernels.interop.accelerate import accelerate, restore
from effnet_kernels.interop.conversion import from_peer
from effnet_kernels.interop.explain import explain
from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.factory import *  # noqa: F403
from effnet_kernels.models.factory import __all__ as _builders
from effnet_kernels.models.variants import VARIANTS, Variant, find_variant
from effnet_kernels.models.weights.convert import convert_state_dict, load_checkpoint
from effnet_kernels.models.weights.pretrained import (
    EfficientNet_B0_Weights,
    EfficientNet_B1_Weights,
    EfficientNet_B2_Weights,
    EfficientNet_B3_Weights,
    EfficientNet_B4_Weights,
    EfficientNet_B5_Weights,
    EfficientNet_B6_Weights,
    EfficientNet_B7_Weights,
    EfficientNet_Lite0_Weights,
    EfficientNet_Lite1_Weights,
    EfficientNet_Lite2_Weights,
    EfficientNet_V2_L_Weights,
    EfficientNet_V2_M_Weights,
    EfficientNet_V2_S_Weights,
    imagenet_classes,
    resolve_weights,
)
from effnet_kernels.modules import (
    ConvBnAct,
    FusedMBConv,
    FusedMBConvConfig,
    MBConv,
    MBConvConfig,
    SqueezeExcitation,
    StochasticDepth,
)
from effnet_kernels.tools.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "BackendError",
    "ConvBnAct",
    "EfficientNet",
    "EfficientNet_B0_Weights",
    "EfficientNet_B1_Weights",
    "EfficientNet_B2_Weights",
    "EfficientNet_B3_Weights",
    "EfficientNet_B4_Weights",
    "EfficientNet_B5_Weights",
    "EfficientNet_B6_Weights",
    "EfficientNet_B7_Weights",
    "EfficientNet_Lite0_Weights",
    "EfficientNet_Lite1_Weights",
    "EfficientNet_Lite2_Weights",
    "EfficientNet_V2_L_Weights",
    "EfficientNet_V2_M_Weights",
    "EfficientNet_V2_S_Weights",
    "FusedMBConv",
    "FusedMBConvConfig",
    "MBConv",
    "MBConvConfig",
    "NativeExtensionWarning",
    "SqueezeExcitation",
    "StochasticDepth",
    "Variant",
    "accelerate",
    "convert_state_dict",
    "explain",
    "find_variant",
    "freeze",
    "from_peer",
    "imagenet_classes",
    "load_checkpoint",
    "release_memory",
    "resolve_weights",
    "restore",
    "use_backend",
    "warmup",
]
__all__ += _builders
