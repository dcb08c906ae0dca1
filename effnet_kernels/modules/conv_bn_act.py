"""Convolution, BatchNorm, activation."""

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels.fusion.geometry import same_padding
from effnet_kernels.fusion.inspection import ACTIVATIONS_OF, Unsupported, checked
from effnet_kernels.fusion.lowering import ChainSpec, lower_chain, lower_layer
from effnet_kernels.fusion.spec import Activation, Layer
from effnet_kernels.modules.fused_module import FusedModule

PaddingMode = Literal["symmetric", "same"]
"""``"symmetric"``: (k - 1) // 2 zeros on each side, as torchvision; ``"same"``: TensorFlow's, from the input's size."""

# A symbolic trace has no sizes to compare: it records the call instead.
torch.fx.wrap("same_padding")


class Conv2dSame(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, decided by the size of each input."""

    def forward(self, input: Tensor) -> Tensor:
        left, right, top, bottom = same_padding(input.shape[2], input.shape[3], self.kernel_size[0], self.stride[0])
        padded = F.pad(input, [left, right, top, bottom])
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ConvBnAct(FusedModule, nn.Sequential):
    """Convolution, norm and activation, with the children 0, 1 and 2 (torchvision's ``Conv2dNormActivation``).

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride: of rows and columns alike.
        groups: 1, or ``in_channels`` for a depthwise convolution.
        norm_layer: builds the norm of ``out_channels``.
        activation: its name; with ``"none"`` there is no child 2.
        padding: ``"symmetric"`` or ``"same"``.

    Attributes:
        skip_nonfinite_statistics: set to True, a batch whose mean or variance of a channel is not finite (an overflow
            in float16, whose step a gradient scaler skips) leaves that channel's running statistics as they are. False,
            the default, writes them as torch does. It holds where kernels or the reference run.

    Shapes: [N, in_channels, H, W] to [N, out_channels, H', W'], in the input's memory format.
    """

    # TorchScript compiles properties unless they are named here; the eager path asks none.
    __jit_unused_properties__ = ("conv", "norm")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        activation: Activation = "silu",
        padding: PaddingMode = "symmetric",
    ) -> None:
        if padding not in ("symmetric", "same"):
            raise ValueError(f"padding: expected 'symmetric' or 'same', got {padding!r}")
        # At stride 1 an odd kernel's SAME padding is symmetric.
        same = padding == "same" and stride > 1
        conv = (Conv2dSame if same else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if same else (kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        layers: list[nn.Module] = [conv, norm_layer(out_channels)]
        if activation != "none":
            layers.append(make_activation(activation))
        super().__init__(*layers)
        self.out_channels = out_channels
        self.skip_nonfinite_statistics = False

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = self.fused(input)
            if fused is not None:
                return fused
            input = self.given_to_hooks(input)
        # Convolution, norm, activation.
        for module in self:
            input = module(input)
        return input

    def pooled(self, input: Tensor) -> Tensor:
        """The spatial mean [N, out_channels] of the output, which the kernels then do not store."""
        mean = self.fused(input, pool=True)
        return F.adaptive_avg_pool2d(self(input), 1).flatten(1) if mean is None else mean

    def chain_spec(self) -> ChainSpec:
        return ChainSpec(lower_chain([self.layer()], residual=False))

    def layer(self, prefix: str = "") -> Layer:
        """The module as a layer of a chain; its children's names in errors begin with ``prefix``.

        Raises Unsupported where no kernel computes it.
        """
        children = list(self._modules.values())
        if list(self._modules) not in (["0", "1"], ["0", "1", "2"]):
            found = ", ".join(self._modules) or "no children"
            raise Unsupported(f"{prefix or 'it '}has the children {found}, not a convolution, a norm and an activation")
        conv = checked(f"{prefix}0", children[0], (nn.Conv2d, Conv2dSame))
        norm = checked(f"{prefix}1", children[1], (nn.BatchNorm2d, nn.SyncBatchNorm))
        act: Activation = "none"
        if len(children) == 3:
            act = ACTIVATIONS_OF[type(checked(f"{prefix}2", children[2], tuple(ACTIVATIONS_OF)))]
        padding: int | Literal["same"] = "same" if isinstance(conv, Conv2dSame) else cast(int, conv.padding[0])
        return lower_layer(f"{prefix}0", conv, cast(nn.BatchNorm2d, norm), act, padding, self.skip_nonfinite_statistics)

    @property
    def conv(self) -> nn.Conv2d:
        # Sequential's own indexing walks its keys: too slow for something asked several times a call.
        return cast(nn.Conv2d, self._modules["0"])

    @property
    def norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self._modules["1"])


def make_activation(activation: Activation) -> nn.Module:
    """The activation's module, in place, as torchvision builds it."""
    for module_type, name in ACTIVATIONS_OF.items():
        if name == activation and module_type is not nn.Identity:
            return module_type(inplace=True)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS_OF.values())}, got {activation!r}")
