"""EfficientNet V1 and V2."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select
from effnet_kernels.fusion.inspection import is_plain
from effnet_kernels.fusion.spec import Activation
from effnet_kernels.models.features import FeatureInfo, Features, check_images
from effnet_kernels.models.lukemelas_interface import ALIASES, LukemelasInterface
from effnet_kernels.models.scaling import scaled_variant
from effnet_kernels.models.variants import Variant
from effnet_kernels.modules import BlockConfig, ConvBnAct
from effnet_kernels.modules.conv_bn_act import PaddingMode

Network = TypeVar("Network", bound="EfficientNet")


class EfficientNet(LukemelasInterface):
    """EfficientNet V1 (Tan and Le 2019) and V2 (Tan and Le 2021).

    The positional arguments, the state dict and, from one seed, the initial weights are torchvision's.

    Args:
        inverted_residual_setting: the stages, as ``MBConvConfig`` and ``FusedMBConvConfig``.
        dropout: the probability of dropout before the classifier.
        stochastic_depth_prob: the probability of the last block; the others' rise linearly to it.
        num_classes: outputs of the classifier; 0 leaves it out and the model returns the pooled features.
        norm_layer: builds a norm from its number of channels; BatchNorm2d if None.
        last_channel: channels of the head convolution; None for four times the last stage's.
        in_chans: channels of the image.
        activation: of the stem and the head (the stages have their own).
        padding: of the stem, ``"symmetric"`` or ``"same"`` (the stages have their own).
        low_resolution: for images such as CIFAR's 32x32: the stem and the first strided stage keep the resolution, so
            that the last map is an eighth of the image instead of a 32nd. Weights and keys are the same.
        features_only: the model is a backbone: it has no head, and returns a list of feature maps. It calls the layers
            of ``features`` and not ``features`` itself, so that hooks belong on the layers.
        out_indices: which of the maps, from 0 (the finest); all if None. Only with ``features_only``.

    Shapes: images [N, in_chans, H, W] of the weights' dtype in any memory format to logits [N, num_classes], pooled
    features [N, num_features], or feature maps [N, C_i, H / r_i, W / r_i] in the image's memory format, where
    ``feature_info.channels()`` and ``feature_info.reduction()`` give C_i and r_i.

    Raises:
        ValueError, TypeError: an argument that does not fit, or an image.
    """

    # TorchScript leaves out the branch that a constant rules out, and the properties named here.
    features_only: Final[bool]
    __jit_unused_properties__ = ("num_classes", *ALIASES)

    def __init__(
        self,
        inverted_residual_setting: Sequence[BlockConfig],
        dropout: float,
        stochastic_depth_prob: float = 0.2,
        num_classes: int = 1000,
        norm_layer: Callable[..., nn.Module] | None = None,
        last_channel: int | None = None,
        *,
        in_chans: int = 3,
        activation: Activation = "silu",
        padding: PaddingMode = "symmetric",
        low_resolution: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(inverted_residual_setting, num_classes, in_chans, features_only, out_indices)
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        settings = list(inverted_residual_setting)
        strides = [2, *(config.stride for config in settings)]
        if low_resolution:
            strides = _keep_resolution(strides)

        stem_channels = settings[0].input_channels
        layers: list[nn.Module] = [
            ConvBnAct(in_chans, stem_channels, 3, strides[0], 1, norm_layer, activation, padding)
        ]
        total_blocks = sum(config.num_layers for config in settings)
        block_index = 0
        for config, stride in zip(settings, strides[1:], strict=True):
            stage: list[nn.Module] = []
            for _ in range(config.num_layers):
                block_config = copy.copy(config)
                block_config.stride = stride
                if stage:
                    block_config.input_channels = config.out_channels
                    block_config.stride = 1
                probability = stochastic_depth_prob * block_index / total_blocks
                stage.append(config.block(block_config, probability, norm_layer))
                block_index += 1
            layers.append(nn.Sequential(*stage))

        self.features_only = features_only
        self.in_chans = in_chans
        if features_only:
            channels = [stem_channels, *(config.out_channels for config in settings)]
            self.feature_info = FeatureInfo.of_layers(channels, strides, out_indices)
            self.feature_layers = self.feature_info.layers()
            self.features = Features(*layers[: self.feature_layers[-1] + 1])
        else:
            head_inputs = settings[-1].out_channels
            self.num_features = last_channel if last_channel is not None else 4 * head_inputs
            layers.append(ConvBnAct(head_inputs, self.num_features, 1, 1, 1, norm_layer, activation))
            self.features = Features(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(
                nn.Dropout(p=dropout, inplace=True), _make_classifier(self.num_features, num_classes)
            )
        for module in self.modules():
            _initialise(module)

    def forward(self, x: Tensor) -> Any:
        if not torch.jit.is_scripting():
            check_images(x)
        if self.features_only:
            return self.maps(x, self.feature_layers)
        # Two conditions, because TorchScript compiles what follows an ``and``.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self._pools_in_head(x):
                return self.classifier(self.features.pooled(x))
        x = self.extract_features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)

    @torch.jit.unused
    def _pools_in_head(self, x: Tensor) -> bool:
        """Whether the head may pool its output before storing it: nothing observes the calls that this leaves out."""
        if select.chain_backend(x) is None or select.global_hook() is not None:
            return False
        if type(self).extract_features is not EfficientNet.extract_features or "extract_features" in self.__dict__:
            return False
        features, avgpool = self.features, self.avgpool
        layers = list(features._modules.values())
        head = layers[-1] if layers else None
        if not (is_plain(features, Features) and is_plain(head, ConvBnAct) and is_plain(avgpool, nn.AdaptiveAvgPool2d)):
            return False
        # A module that was compiled by itself is called as it was compiled.
        return all(module is None or module._compiled_call_impl is None for module in (features, head, avgpool))

    def maps(self, x: Tensor, layers: list[int]) -> list[Tensor]:
        """The outputs of these layers of ``features``, ascending, for images ``x``."""
        # Two conditions, because TorchScript compiles what follows an ``and``.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(self.features, Features):
                return self.features.intermediates(x, layers)
        outputs: list[Tensor] = []
        for index, module in enumerate(self.features):
            x = module(x)
            if index in layers:
                outputs.append(x)
        return outputs

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a newly initialised one; 0 classes leave it out.

        Raises ValueError for a negative number and for a features-only model.
        """
        if self.features_only:
            raise ValueError("expected a model with a classifier, got one that was built with features_only=True")
        _check_num_classes(num_classes)
        like = next(self.features[-1].parameters())
        classifier = _make_classifier(self.num_features, num_classes)
        _initialise(classifier)
        self.classifier[1] = classifier.to(like.device, like.dtype).train(self.training)

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 where there is none."""
        return 0 if self.features_only else getattr(self.classifier[1], "out_features", 0)

    @classmethod
    def from_phi(cls: type[Network], phi: float, **kwargs: Any) -> Network:
        """The network that compound scaling gives for any real ``phi``; see :mod:`effnet_kernels.models.scaling`."""
        return cls.of_variant(scaled_variant(phi), **kwargs)

    @classmethod
    def of_variant(cls: type[Network], variant: Variant, **kwargs: Any) -> Network:
        """A network of a row of the table; keyword arguments of the constructor take precedence over the variant's.

        Raises TypeError for the name of an argument that is another package's.
        """
        for name, ours in _NAMES_ELSEWHERE.items():
            if name in kwargs and cls.__init__ is EfficientNet.__init__:
                raise TypeError(f"expected the argument {ours}, which is what it is called here, got {name}")
        options = {
            "dropout": variant.dropout,
            "norm_layer": variant.norm_layer(),
            "last_channel": variant.last_channel,
            "activation": variant.activation,
            "padding": variant.padding,
        }
        return cls(variant.block_configs(), **{**options, **kwargs})


def _keep_resolution(strides: list[int]) -> list[int]:
    """The strides with the first two halvings taken out: the stem's and the first strided stage's."""
    halvings = [index for index, stride in enumerate(strides) if stride == 2][:2]
    return [1 if index in halvings else stride for index, stride in enumerate(strides)]


def _make_classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def _initialise(module: nn.Module) -> None:
    """Initial weights by torchvision's rule, with its draws in its order."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        if module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1.0 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)


def _check_num_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes: expected an integer >= 0, got {num_classes!r}")


def _check_arguments(
    settings: Sequence[BlockConfig],
    num_classes: int,
    in_chans: int,
    features_only: bool,
    out_indices: Sequence[int] | None,
) -> None:
    if not settings:
        raise ValueError("inverted_residual_setting: expected at least one stage, got none")
    kinds = {type(config) for config in settings} if isinstance(settings, Sequence) else {type(settings)}
    if not isinstance(settings, Sequence) or not all(issubclass(kind, BlockConfig) for kind in kinds):
        got = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds))
        raise TypeError(
            f"inverted_residual_setting: expected a sequence of this package's MBConvConfig or "
            f"FusedMBConvConfig, got {got}"
        )
    _check_num_classes(num_classes)
    if not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f"in_chans: expected an integer >= 1, got {in_chans!r}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices: expected features_only=True beside it, got features_only=False")


# Other packages' names of our arguments.
_NAMES_ELSEWHERE = {
    "in_channels": "in_chans",
    "drop_rate": "dropout",
    "dropout_rate": "dropout",
    "drop_path_rate": "stochastic_depth_prob",
    "drop_connect_rate": "stochastic_depth_prob",
    "act_layer": "activation",
    "activation_layer": "activation",
    "pad_type": "padding",
    "classes": "num_classes",
    "checkpoint_path": "weights",
    "weights_path": "weights",
}
