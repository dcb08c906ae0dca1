"""Convolution, BatchNorm, activation."""

from collections.abc import Callable
from typing import Literal, cast

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import ops
from effnet_kernels.deferred import Activation, Epilogue, Prologue, Reduction
from effnet_kernels.dispatch import Backend
from effnet_kernels.modules.batch_norm import check_batch, fold, uses_batch_statistics
from effnet_kernels.modules.operator_module import ACTIVATION_NAMES, OperatorModule, children_obstacle
from effnet_kernels.ops.checks import resolve_padding, same_padding

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


class ConvBnAct(OperatorModule, nn.Sequential):
    """Convolution, norm and activation, with the children 0, 1 and 2 (torchvision's ``Conv2dNormActivation``).

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride: of rows and columns alike.
        groups: 1, or ``in_channels`` for a depthwise convolution.
        norm_layer: builds the norm of ``out_channels``.
        activation: its name; with ``"none"`` there is no child 2.
        padding: ``"symmetric"`` or ``"same"``.

    Shapes: [N, in_channels, H, W] to [N, out_channels, H', W'], in the input's memory format.
    """

    # TorchScript compiles properties unless they are named here; the textbook path asks none.
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

    def forward_modules(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input

    def forward_operators(self, input: Tensor) -> Tensor:
        y, owed, _ = self.deferred(input)
        return y if owed is None else ops.merge(y, owed)

    def deferred(
        self, x: Tensor, owed: Prologue | None = None, residual: Tensor | None = None, pool: bool = False
    ) -> tuple[Tensor, Prologue | None, Tensor | None]:
        """The convolution of what ``x`` with its debt stands for, with what is owed to the output in turn.

        Where BatchNorm needs the batch's statistics, the output is raw and owes the BatchNorm and the activation.
        Where its statistics are known, both are in the output, ``residual`` is added and, with ``pool``, the spatial
        mean [N, C] is the third result.
        """
        norm = self.norm
        act = ACTIVATION_NAMES[type(self._modules["2"])] if len(self._modules) == 3 else "none"
        if uses_batch_statistics(norm):
            y, stats = self._convolve(x, owed, None, "statistics")
            check_batch(norm, y)
            scale, shift = fold(norm, stats)
            return y, Prologue(scale, shift, act), None
        scale, shift = fold(norm, None)
        y, pooled = self._convolve(x, owed, Epilogue(scale, shift, act, residual), "pool" if pool else "none")
        return y, None, pooled

    def _convolve(
        self, x: Tensor, owed: Prologue | None, epilogue: Epilogue | None, reduction: Reduction
    ) -> tuple[Tensor, Tensor | None]:
        conv = self.conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        if self.is_pointwise():
            return ops.pointwise_conv(x, conv.weight, conv.bias, owed, epilogue, reduction)
        if self.is_depthwise():
            same = isinstance(conv, Conv2dSame)
            padding = resolve_padding(
                "same" if same else int(conv.padding[0]), (x.shape[2], x.shape[3]), kernel, stride
            )
            return ops.depthwise_conv(x, conv.weight, stride, padding, owed, epilogue, reduction)
        # A dense convolution is torch's own; what surrounds it is ours.
        assert owed is None
        y = conv(x)
        if epilogue is not None:
            y = ops.merge(y, Prologue(epilogue.scale, epilogue.shift, epilogue.act), epilogue.residual)
        return y, ops.channel_statistics(y) if reduction == "statistics" else None

    @property
    def conv(self) -> nn.Conv2d:
        # Sequential's own indexing walks its keys: too slow for something asked several times a call.
        return cast(nn.Conv2d, self._modules["0"])

    @property
    def norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self._modules["1"])

    def is_pointwise(self) -> bool:
        conv = self.conv
        return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1

    def is_depthwise(self) -> bool:
        conv = self.conv
        return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels and conv.bias is None

    def obstacle(self) -> str | None:
        children = self._modules
        if list(children) not in (["0", "1"], ["0", "1", "2"]):
            return f"it has the children {', '.join(children)}, not a convolution, a norm and an activation"
        return (
            children_obstacle(
                (name, children[name], expected) for name, expected in zip(children, _CHILDREN, strict=False)
            )
            or self._convolution_obstacle()
        )

    def _convolution_obstacle(self) -> str | None:
        conv = self.conv
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.dilation != (1, 1):
            return "0 has a padding mode or a dilation that the operators do not know"
        if any(pair[0] != pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding)):
            return "0 has a rectangular kernel, stride or padding"
        if conv.kernel_size[0] == 1 and conv.padding[0] != 0:
            return "0 pads a 1x1 convolution"
        return None

    def kernel_obstacle(self, backend: Backend) -> str | None:
        if not self.is_pointwise():
            return "a convolution outside of MBConv blocks, which torch computes"
        return statistics_obstacle(self)


def statistics_obstacle(*layers: "ConvBnAct") -> str | None:
    """Why the native kernels would not help layers that normalise by the batch, as in train mode under no_grad."""
    if any(uses_batch_statistics(layer.norm) for layer in layers):
        return "batch statistics are needed, and the native kernels return none in this version"
    return None


_CHILDREN: tuple[tuple[type[nn.Module], ...], ...] = (
    (nn.Conv2d, Conv2dSame),
    (nn.BatchNorm2d,),
    tuple(ACTIVATION_NAMES),
)


def make_activation(activation: Activation) -> nn.Module:
    """The activation's module, in place, as torchvision builds it."""
    for module_type, name in ACTIVATION_NAMES.items():
        if name == activation and module_type is not nn.Identity:
            return module_type(inplace=True)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATION_NAMES.values())}, got {activation!r}")
