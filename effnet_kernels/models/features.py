"""The stem, stages and head of a network as a sequence, and its feature maps."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select
from effnet_kernels.fusion.autograd import channels_last
from effnet_kernels.modules import fused_sequence
from effnet_kernels.modules.conv_bn_act import ConvBnAct
from effnet_kernels.modules.fused_module import memory_format


def check_images(x: object) -> None:
    """Raises TypeError for anything but a tensor or its proxy in a trace, ValueError for a rank other than 4."""
    if isinstance(x, Tensor):
        if x.dim() != 4:
            hint = "; images[None] is a batch of one" if x.dim() == 3 else ""
            raise ValueError(f"expected images [N, C, H, W], got shape {tuple(x.shape)}{hint}")
    elif not hasattr(type(x), "__torch_function__"):
        raise TypeError(
            f"expected images as a tensor [N, C, H, W], got {type(x).__name__}; torch.as_tensor makes one of "
            "an array, transforms() of the weights one of a photograph"
        )


class Features(nn.Sequential):
    """A sequence of layers, walked in channels-last strides where operators run, and in bfloat16 on the CPU.

    The strides are converted once, on the way in, and outputs come in the input's memory format. A slice is a
    ``Features`` too.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Two conditions, because TorchScript compiles what follows an ``and``.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if len(self) > 0 and select.interception(input) is None:
                y = fused_sequence.infer(self, input)
                if y is not None:
                    return y.contiguous(memory_format=memory_format(input))
                return self.intermediates(input, [len(self) - 1])[0]
        for module in self:
            input = module(input)
        return input

    @torch.jit.unused
    def intermediates(self, input: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of these layers (ascending), in the input's memory format."""
        x, outputs = input, []
        if select.prefers_channels_last(input):
            x = channels_last(x)
        for index, module in enumerate(self):
            x = fused_sequence.call(module, x)
            if index in indices:
                outputs.append(x)
        if select.interception(input) is None:
            outputs = [output.contiguous(memory_format=memory_format(input)) for output in outputs]
        return outputs

    @torch.jit.unused
    def pooled(self, input: Tensor) -> Tensor:
        """The spatial mean [N, C] of the last layer's output, which it need not store."""
        mean = fused_sequence.infer(self, input, pool=True)
        if mean is not None:
            return mean
        x = channels_last(input)
        *layers, head = self
        for module in layers:
            x = fused_sequence.call(module, x)
        return cast(ConvBnAct, head).pooled(x)


class Feature(NamedTuple):
    """A feature map: its index in ``features``, its channels, and the pixels of the image that one of its own spans."""

    layer: int
    channels: int
    reduction: int


class FeatureInfo(list[Feature]):
    """The maps that a features-only model returns, the finest first."""

    @classmethod
    def of_layers(
        cls, channels: Sequence[int], strides: Sequence[int], out_indices: Sequence[int] | None
    ) -> "FeatureInfo":
        """The last layer of each resolution, out of all layers' channels and strides; ``out_indices`` of them.

        Raises ValueError for indices that are not ascending or out of range.
        """
        last: dict[int, Feature] = {}
        reduction = 1
        for layer, (layer_channels, stride) in enumerate(zip(channels, strides, strict=True)):
            reduction *= stride
            last[reduction] = Feature(layer, layer_channels, reduction)
        maps = list(last.values())
        if out_indices is None:
            return cls(maps)
        chosen = list(out_indices) if isinstance(out_indices, Sequence) else []
        fit = all(isinstance(index, int) and 0 <= index < len(maps) for index in chosen)
        if not chosen or not fit or sorted(set(chosen)) != chosen:
            raise ValueError(
                f"out_indices: expected ascending indices out of 0 to {len(maps) - 1}, got {out_indices!r}"
            )
        return cls(maps[index] for index in chosen)

    def layers(self) -> list[int]:
        return [feature.layer for feature in self]

    def channels(self) -> list[int]:
        return [feature.channels for feature in self]

    def reduction(self) -> list[int]:
        return [feature.reduction for feature in self]
