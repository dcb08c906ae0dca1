"""The released networks as rows of typed tables.

V1: Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", Table 1 and the
coefficients of its released code (B8 and L2 follow in Xie et al. 2020, AdvProp and Noisy Student). Lite: the same
network without squeeze-and-excitation, with ReLU6 and an unscaled stem and head (TensorFlow's `efficientnet/lite`).
V2: Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training", Table 4 and its released code.
"""

import difflib
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from torch import nn

from effnet_kernels.fusion.spec import Activation
from effnet_kernels.modules import BlockConfig, FusedMBConvConfig, MBConvConfig
from effnet_kernels.modules.block_config import make_divisible
from effnet_kernels.modules.conv_bn_act import PaddingMode


class Stage(NamedTuple):
    """A row of Table 1 (V1) or Table 4 (V2)."""

    kind: Literal["mbconv", "fused"]
    expand_ratio: int
    kernel: int
    stride: int
    input_channels: int
    out_channels: int
    num_layers: int


V1_STAGES = (
    Stage("mbconv", 1, 3, 1, 32, 16, 1),
    Stage("mbconv", 6, 3, 2, 16, 24, 2),
    Stage("mbconv", 6, 5, 2, 24, 40, 2),
    Stage("mbconv", 6, 3, 2, 40, 80, 3),
    Stage("mbconv", 6, 5, 1, 80, 112, 3),
    Stage("mbconv", 6, 5, 2, 112, 192, 4),
    Stage("mbconv", 6, 3, 1, 192, 320, 1),
)

V2_BASE_STAGES = (
    Stage("fused", 1, 3, 1, 32, 16, 1),
    Stage("fused", 4, 3, 2, 16, 32, 2),
    Stage("fused", 4, 3, 2, 32, 48, 2),
    Stage("mbconv", 4, 3, 2, 48, 96, 3),
    Stage("mbconv", 6, 3, 1, 96, 112, 5),
    Stage("mbconv", 6, 3, 2, 112, 192, 8),
)

V2_S_STAGES = (
    Stage("fused", 1, 3, 1, 24, 24, 2),
    Stage("fused", 4, 3, 2, 24, 48, 4),
    Stage("fused", 4, 3, 2, 48, 64, 4),
    Stage("mbconv", 4, 3, 2, 64, 128, 6),
    Stage("mbconv", 6, 3, 1, 128, 160, 9),
    Stage("mbconv", 6, 3, 2, 160, 256, 15),
)

V2_M_STAGES = (
    Stage("fused", 1, 3, 1, 24, 24, 3),
    Stage("fused", 4, 3, 2, 24, 48, 5),
    Stage("fused", 4, 3, 2, 48, 80, 5),
    Stage("mbconv", 4, 3, 2, 80, 160, 7),
    Stage("mbconv", 6, 3, 1, 160, 176, 14),
    Stage("mbconv", 6, 3, 2, 176, 304, 18),
    Stage("mbconv", 6, 3, 1, 304, 512, 5),
)

V2_L_STAGES = (
    Stage("fused", 1, 3, 1, 32, 32, 4),
    Stage("fused", 4, 3, 2, 32, 64, 7),
    Stage("fused", 4, 3, 2, 64, 96, 7),
    Stage("mbconv", 4, 3, 2, 96, 192, 10),
    Stage("mbconv", 6, 3, 1, 192, 224, 19),
    Stage("mbconv", 6, 3, 2, 224, 384, 25),
    Stage("mbconv", 6, 3, 1, 384, 640, 7),
)

V2_XL_STAGES = (
    Stage("fused", 1, 3, 1, 32, 32, 4),
    Stage("fused", 4, 3, 2, 32, 64, 8),
    Stage("fused", 4, 3, 2, 64, 96, 8),
    Stage("mbconv", 4, 3, 2, 96, 192, 16),
    Stage("mbconv", 6, 3, 1, 192, 256, 24),
    Stage("mbconv", 6, 3, 2, 256, 512, 32),
    Stage("mbconv", 6, 3, 1, 512, 640, 8),
)


@dataclass(frozen=True)
class Variant:
    """A released network.

    Attributes:
        resolution: rows and columns of the image that it is evaluated at.
        width, depth: the compound scaling's multipliers of channels and of blocks.
        dropout: before the classifier.
        bn_eps, bn_momentum: BatchNorm's, as ``torch.nn.BatchNorm2d`` has them.
        last_channel: channels of the head convolution; None for four times the last stage's.
        scales_ends: whether depth scales the first and last stage, and width the stem (Lite leaves them).
        channel_round_limit: the smallest share of its channels that rounding down may leave a layer; below it, one
            step up (0, as V2-B has it: always the nearest).
    """

    name: str
    stages: tuple[Stage, ...]
    width: float
    depth: float
    resolution: int
    dropout: float
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    activation: Activation = "silu"
    padding: PaddingMode = "symmetric"
    squeeze_ratio: float | None = 0.25
    last_channel: int | None = None
    scales_ends: bool = True
    channel_round_limit: float = 0.9

    def block_configs(self) -> list[BlockConfig]:
        """The ``inverted_residual_setting`` of this network."""
        last = len(self.stages) - 1
        return [self._config(stage, index == 0, index == last) for index, stage in enumerate(self.stages)]

    def _config(self, stage: Stage, first: bool, last: bool) -> BlockConfig:
        keeps_depth = (first or last) and not self.scales_ends
        layers = stage.num_layers if keeps_depth else BlockConfig.adjust_depth(stage.num_layers, self.depth)
        inputs = stage.input_channels if first and not self.scales_ends else self._channels(stage.input_channels)
        outputs = self._channels(stage.out_channels)
        shape = (stage.expand_ratio, stage.kernel, stage.stride, inputs, outputs, layers)
        if stage.kind == "fused":
            return FusedMBConvConfig(*shape, activation=self.activation, padding=self.padding)
        return MBConvConfig(*shape, activation=self.activation, padding=self.padding, squeeze_ratio=self.squeeze_ratio)

    def _channels(self, channels: int) -> int:
        return make_divisible(channels * self.width, round_limit=self.channel_round_limit)

    def norm_layer(self) -> partial[nn.BatchNorm2d]:
        """BatchNorm with this network's settings."""
        return partial(nn.BatchNorm2d, eps=self.bn_eps, momentum=self.bn_momentum)


def _v1(name: str, width: float, depth: float, resolution: int, dropout: float, **settings: float) -> Variant:
    return Variant(f"efficientnet_{name}", V1_STAGES, width, depth, resolution, dropout, **settings)  # type: ignore[arg-type]


def _lite(name: str, width: float, depth: float, resolution: int, dropout: float) -> Variant:
    return Variant(
        f"efficientnet_{name}",
        V1_STAGES,
        width,
        depth,
        resolution,
        dropout,
        activation="relu6",
        squeeze_ratio=None,
        last_channel=1280,
        scales_ends=False,
    )


def _v2(name: str, stages: tuple[Stage, ...], resolution: int, dropout: float) -> Variant:
    return Variant(f"efficientnet_{name}", stages, 1.0, 1.0, resolution, dropout, bn_eps=1e-3, last_channel=1280)


def _v2_base(name: str, width: float, depth: float, resolution: int, dropout: float) -> Variant:
    return Variant(
        f"efficientnet_{name}",
        V2_BASE_STAGES,
        width,
        depth,
        resolution,
        dropout,
        bn_eps=1e-3,
        last_channel=make_divisible(1280 * width, round_limit=0.0),
        channel_round_limit=0.0,
    )


_LARGE = {"bn_eps": 1e-3, "bn_momentum": 0.01}

_RELEASED = (
    _v1("b0", 1.0, 1.0, 224, 0.2),
    _v1("b1", 1.0, 1.1, 240, 0.2),
    _v1("b2", 1.1, 1.2, 260, 0.3),
    _v1("b3", 1.2, 1.4, 300, 0.3),
    _v1("b4", 1.4, 1.8, 380, 0.4),
    _v1("b5", 1.6, 2.2, 456, 0.4, **_LARGE),
    _v1("b6", 1.8, 2.6, 528, 0.5, **_LARGE),
    _v1("b7", 2.0, 3.1, 600, 0.5, **_LARGE),
    _v1("b8", 2.2, 3.6, 672, 0.5, **_LARGE),
    _v1("l2", 4.3, 5.3, 800, 0.5, **_LARGE),
    _lite("lite0", 1.0, 1.0, 224, 0.2),
    _lite("lite1", 1.0, 1.1, 240, 0.2),
    _lite("lite2", 1.1, 1.2, 260, 0.3),
    _lite("lite3", 1.2, 1.4, 280, 0.3),
    _lite("lite4", 1.4, 1.8, 300, 0.3),
    _v2("v2_s", V2_S_STAGES, 384, 0.2),
    _v2("v2_m", V2_M_STAGES, 480, 0.3),
    _v2("v2_l", V2_L_STAGES, 480, 0.4),
    _v2("v2_xl", V2_XL_STAGES, 512, 0.4),
    _v2_base("v2_b0", 1.0, 1.0, 224, 0.2),
    _v2_base("v2_b1", 1.0, 1.1, 240, 0.2),
    _v2_base("v2_b2", 1.1, 1.2, 260, 0.3),
    _v2_base("v2_b3", 1.2, 1.4, 300, 0.3),
)

# The tf_ networks compute as TensorFlow's checkpoints expect: SAME padding, and BatchNorm as TensorFlow sets it.
_TENSORFLOW = tuple(replace(v, name=f"tf_{v.name}", padding="same", bn_eps=1e-3, bn_momentum=0.01) for v in _RELEASED)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (*_RELEASED, *_TENSORFLOW)}


def find_variant(name: str) -> Variant:
    """The row of the table; raises ValueError with the nearest names where there is none."""
    if not isinstance(name, str) or name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3) if isinstance(name, str) else []
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(VARIANTS)}"
        raise ValueError(f"expected the name of a variant, got {name!r}{hint}")
    return VARIANTS[name]
