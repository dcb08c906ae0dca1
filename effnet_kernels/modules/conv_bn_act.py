"""Convolution, BatchNorm, activation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import dispatch, ops, registration
from effnet_kernels.deferred import Activation, Epilogue, Padding, Prologue, Reduction
from effnet_kernels.dispatch import Backend
from effnet_kernels.modules.batch_norm import check_batch, fold, uses_batch_statistics
from effnet_kernels.modules.operator_module import ACTIVATION_NAMES, OperatorModule, children_obstacle, kernels
from effnet_kernels.modules.squeeze_excitation import SqueezeExcitation
from effnet_kernels.ops.checks import output_size, resolve_padding, same_padding
from effnet_kernels.ops.depthwise_conv import has_depthwise, no_depthwise

if TYPE_CHECKING:
    from effnet_kernels import block

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

    Attributes:
        skip_nonfinite_statistics: on the GPU kernels, a batch whose mean or variance of a channel is not finite (an
            overflow in float16 that a gradient scaler will skip) does not move that channel's running statistics. False
            writes them as torch does.

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
        self.skip_nonfinite_statistics = True

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
        act = self._activation()
        if uses_batch_statistics(norm):
            y, stats = self._convolve(x, owed, None, "statistics")
            check_batch(norm, y)
            scale, shift = fold(norm, stats)
            return y, Prologue(scale, shift, act), None
        scale, shift = fold(norm, None)
        y, pooled = self._convolve(x, owed, Epilogue(scale, shift, act, residual), "pool" if pool else "none")
        return y, None, pooled

    def forward_chain(self, input: Tensor) -> Tensor:
        return self._run_alone(input, pool=False)

    def _run_alone(self, input: Tensor, pool: bool) -> Tensor:
        size = (input.shape[2], input.shape[3])
        return run_chain(self.plan((size, pool), lambda: plan_chain([self], size, pool=pool)), input, None)

    def pooled(self, input: Tensor) -> Tensor:
        """The spatial mean [N, out_channels] of the output, which the kernels then do not store."""
        if dispatch.choose(self, input).backend in ("cpu", "triton"):
            return self._run_alone(input.contiguous(memory_format=torch.channels_last), pool=True)
        return F.adaptive_avg_pool2d(self(input), 1).flatten(1)

    def layer(self, size: tuple[int, int], excitation: SqueezeExcitation | None = None) -> "ChainLayer":
        """This module, and squeeze-and-excitation after it, as a layer of a chain for inputs of ``size`` (H, W)."""
        from effnet_kernels import block

        conv, norm = self.conv, self.norm
        tracking = norm.training and norm.track_running_stats
        batch_statistics = uses_batch_statistics(norm)
        layer = block.Layer(
            "pointwise" if self.is_pointwise() else "depthwise" if self.is_depthwise() else "dense",
            conv.stride[0],
            self._padding(size),
            self._activation(),
            norm.eps,
            norm.momentum,
            batch_statistics,
            self.skip_nonfinite_statistics,
            None if excitation is None else ACTIVATION_NAMES[type(excitation.activation)],
        )
        parameters = block.Parameters(conv.weight, conv.bias, norm.weight, norm.bias)
        if excitation is not None:
            fc1, fc2 = excitation.fc1, excitation.fc2
            parameters = block.Parameters(*parameters[:4], fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        buffers = block.Buffers(None, None, None)
        if tracking or not batch_statistics:
            buffers = block.Buffers(norm.running_mean, norm.running_var, norm.num_batches_tracked)
        return ChainLayer(layer, parameters, buffers)

    def _activation(self) -> Activation:
        return ACTIVATION_NAMES[type(self._modules["2"])] if len(self._modules) == 3 else "none"

    def _padding(self, size: tuple[int, int]) -> Padding:
        conv = self.conv
        padding = "same" if isinstance(conv, Conv2dSame) else int(conv.padding[0])
        return resolve_padding(padding, size, conv.kernel_size[0], conv.stride[0])

    def _convolve(
        self, x: Tensor, owed: Prologue | None, epilogue: Epilogue | None, reduction: Reduction
    ) -> tuple[Tensor, Tensor | None]:
        conv = self.conv
        if self.is_pointwise():
            return ops.pointwise_conv(x, conv.weight, conv.bias, owed, epilogue, reduction)
        if self.is_depthwise():
            padding = self._padding((x.shape[2], x.shape[3]))
            return ops.depthwise_conv(x, conv.weight, conv.stride[0], padding, owed, epilogue, reduction)
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

    def find_obstacle(self) -> str | None:
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
        conv = self.conv
        if self.is_depthwise():
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            return None if has_depthwise(backend, kernel, stride) else no_depthwise(kernel, stride)
        return None if conv.groups == 1 else "a grouped convolution, which torch computes"

    def kernel_reason(self, backend: Backend) -> str:
        if not self.is_pointwise() and not self.is_depthwise():
            return f"the dense convolution by torch, the rest by {kernels(backend)}"
        return kernels(backend)


class ChainLayer(NamedTuple):
    """A layer of a chain: what is fixed about it, its parameters and its buffers."""

    layer: "block.Layer"
    parameters: "block.Parameters"
    buffers: "block.Buffers"


class ChainPlan(NamedTuple):
    """A chain and the tensors of its layers."""

    chain: "block.Chain"
    parameters: "list[block.Parameters]"
    buffers: "list[block.Buffers]"


def plan_chain(
    modules: Sequence[ConvBnAct],
    size: tuple[int, int],
    excitation: SqueezeExcitation | None = None,
    residual: bool = False,
    pool: bool = False,
) -> ChainPlan:
    """Modules in a row as one fused chain for inputs of ``size`` (H, W); ``excitation`` is before the last of them."""
    from effnet_kernels import block

    layers: list[ChainLayer] = []
    for index, module in enumerate(modules):
        entry = module.layer(size, excitation if index == len(modules) - 2 else None)
        layers.append(entry)
        left, right, top, bottom = entry.layer.padding
        kernel, stride = module.conv.kernel_size[0], entry.layer.stride
        size = (output_size(size[0], kernel, stride, top, bottom), output_size(size[1], kernel, stride, left, right))
    chain = block.Chain(tuple(entry.layer for entry in layers), residual, pool)
    return ChainPlan(chain, [entry.parameters for entry in layers], [entry.buffers for entry in layers])


def run_chain(plan: ChainPlan, x: Tensor, keep: Tensor | None) -> Tensor:
    """The chain of x [N, C, H, W] in channels-last strides, called or traced.

    Raises ValueError where the channels or the device are not those of the weights, which a kernel would not notice.
    """
    weight = plan.parameters[0].weight
    channels = weight.shape[0] if plan.chain.layers[0].kind == "depthwise" else weight.shape[1]
    if x.shape[1] != channels:
        raise ValueError(f"expected an input [N, {channels}, H, W], got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"expected the input on {weight.device}, where the weights are, got {x.device}")
    if torch.compiler.is_compiling():
        return registration.run_traced(plan.chain, x, keep, plan.parameters, plan.buffers)
    from effnet_kernels import block

    return block.run(plan.chain, x, keep, plan.parameters, plan.buffers)


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
