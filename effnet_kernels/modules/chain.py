"""Chains of convolutions as modules have them: each with its BatchNorm and activation, whoever's modules they are."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import registration
from effnet_kernels.deferred import Activation, Gate, Padding
from effnet_kernels.dispatch import Backend
from effnet_kernels.modules.operator_module import OperatorModule, kernels
from effnet_kernels.ops.depthwise_conv import has_depthwise, no_depthwise
from effnet_kernels.primitives import PrimitivesBackend

if TYPE_CHECKING:
    from effnet_kernels import block


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether the module normalises by the batch's statistics, as torch decides it."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


class ConvNorm(NamedTuple):
    """A convolution, its BatchNorm and its activation.

    Attributes:
        padding: an integer, (left, right, top, bottom) or ``"same"``, as the module pads; ``conv``'s own is not asked.
        skip_nonfinite: see :class:`~effnet_kernels.modules.ConvBnAct`.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    act: Activation
    padding: int | Padding | Literal["same"]
    skip_nonfinite: bool = False

    def kind(self) -> Literal["pointwise", "depthwise", "dense"]:
        conv = self.conv
        if tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) == (1, 1) and conv.groups == 1:
            return "pointwise"
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels and conv.bias is None:
            return "depthwise"
        return "dense"

    def kernel_obstacle(self, backend: Backend) -> str | None:
        conv = self.conv
        if self.kind() == "depthwise":
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            return None if has_depthwise(backend, kernel, stride) else no_depthwise(kernel, stride)
        return None if conv.groups == 1 else "a grouped convolution, which torch computes"

    def misfit(self, channels: int | None) -> str | None:
        """Why the tensors do not have the shapes that the modules' settings say, or other input channels, or None."""
        conv, norm = self.conv, self.norm
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if tuple(conv.weight.shape) != shape:
            return f"its weight has the shape {tuple(conv.weight.shape)}, expected {shape}"
        if channels is not None and conv.in_channels != channels:
            return f"it has {conv.in_channels} input channels, and {channels} come"
        for vector in (conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if vector is not None and tuple(vector.shape) != shape[:1]:
                return f"it has a bias, or its norm has a vector, of shape {tuple(vector.shape)}, expected {shape[:1]}"
        if (norm.running_mean is None) != (norm.running_var is None):
            return "its norm has one of running_mean and running_var"
        return None

    def keeps_size(self) -> bool:
        """Whether a map of any size keeps its size."""
        if self.conv.stride[0] != 1:
            return False
        if self.padding == "same":
            return True
        left, right, top, bottom = (self.padding,) * 4 if isinstance(self.padding, int) else self.padding
        return left + right == top + bottom == self.conv.kernel_size[0] - 1


class ExcitationLayers(NamedTuple):
    """The two layers of squeeze-and-excitation, 1x1 convolutions, with an activation between and a gate behind."""

    fc1: nn.Conv2d
    fc2: nn.Conv2d
    act: Activation
    gate: Gate = "sigmoid"

    def misfit(self, channels: int) -> str | None:
        """Why the layers do not make a gate of so many channels, or None."""
        squeezed = self.fc1.out_channels
        for name, fc, shape in (
            ("first", self.fc1, (squeezed, channels, 1, 1)),
            ("second", self.fc2, (channels, squeezed, 1, 1)),
        ):
            if tuple(fc.weight.shape) != shape or (fc.bias is not None and tuple(fc.bias.shape) != shape[:1]):
                return f"squeeze-and-excitation's {name} layer has a weight {tuple(fc.weight.shape)}, expected {shape}"
        return None


class Parts(NamedTuple):
    """What a module computes: a chain of convolutions, and what is around it.

    Attributes:
        layers: the convolutions; a dense one can only be the first.
        excitation: squeeze-and-excitation of the input of the last of them, which then is a 1x1 convolution.
        residual: whether the input is added to the output.
        keep: draws stochastic depth's factors [N] for a module's arguments, or None where it would change nothing.
    """

    layers: tuple[ConvNorm, ...]
    excitation: ExcitationLayers | None = None
    residual: bool = False
    keep: Callable[..., Tensor | None] | None = None

    def misfit(self) -> str | None:
        """Why the tensors do not fit one another, so that torch would raise an error or broadcast, or None."""
        channels = None
        for index, layer in enumerate(self.layers):
            found = layer.misfit(channels)
            if found is not None:
                return f"convolution {index}: {found}"
            channels = layer.conv.out_channels
            if self.residual and not layer.keeps_size():
                return f"convolution {index} changes the size of the map, to which the residual is added"
        first, last = self.layers[0].conv, self.layers[-1].conv
        if self.residual and first.in_channels != last.out_channels:
            return f"a residual of {first.in_channels} channels is added to {last.out_channels}"
        if self.excitation is None:
            return None
        return self.excitation.misfit(last.in_channels)

    def tensors(self) -> list[Tensor]:
        """All parameters and statistics that the parts are computed with."""
        found = [t for conv, norm, *_ in self.layers for t in (conv.weight, conv.bias, norm.weight, norm.bias)]
        found += [t for layer in self.layers for t in (layer.norm.running_mean, layer.norm.running_var)]
        if self.excitation is not None:
            found += [t for fc in self.excitation[:2] for t in (fc.weight, fc.bias)]
        return [t for t in found if t is not None]

    def draw(self, *arguments: Any, **named: Any) -> Tensor | None:
        return None if self.keep is None or not self.residual else self.keep(*arguments, **named)


class ChainPlan(NamedTuple):
    """A chain and the tensors of its layers."""

    chain: "block.Chain"
    parameters: "list[block.Parameters]"
    buffers: "list[block.Buffers]"


def plan_chain(parts: Parts, pool: bool = False) -> ChainPlan:
    """The parts as one fused chain."""
    from effnet_kernels import block

    layers: list[block.Layer] = []
    parameters: list[block.Parameters] = []
    buffers: list[block.Buffers] = []
    for index, part in enumerate(parts.layers):
        conv, norm = part.conv, part.norm
        excitation = parts.excitation if index == len(parts.layers) - 2 else None
        batch_statistics = uses_batch_statistics(norm)
        layers.append(
            block.Layer(
                part.kind(),
                conv.stride[0],
                part.padding if isinstance(part.padding, str | tuple) else (part.padding,) * 4,
                part.act,
                norm.eps,
                norm.momentum,
                batch_statistics,
                part.skip_nonfinite,
                *(() if excitation is None else (excitation.act, excitation.gate)),
            )
        )
        own = block.Parameters(conv.weight, conv.bias, norm.weight, norm.bias)
        if excitation is not None:
            fc1, fc2 = excitation.fc1, excitation.fc2
            own = block.Parameters(*own[:4], fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        parameters.append(own)
        reads = not batch_statistics or (norm.training and norm.track_running_stats)
        buffers.append(
            block.Buffers(norm.running_mean, norm.running_var, norm.num_batches_tracked)
            if reads
            else block.Buffers(None, None, None)
        )
    return ChainPlan(block.Chain(tuple(layers), parts.residual, pool), parameters, buffers)


def run_chain(backend: PrimitivesBackend, plan: ChainPlan, x: Tensor, keep: Tensor | None) -> Tensor:
    """The chain of x [N, C, H, W] in channels-last strides on a backend's primitives, called or traced.

    Raises ValueError where the channels, the device or the dtype are not those of the weights, which a kernel would not
    notice. Maps of lower precision go with float32 weights, as under autocast.
    """
    weight = plan.parameters[0].weight
    channels = weight.shape[0] if plan.chain.layers[0].kind == "depthwise" else weight.shape[1]
    if x.shape[1] != channels:
        raise ValueError(f"expected an input [N, {channels}, H, W], got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"expected the input on {weight.device}, where the weights are, got {x.device}")
    if x.dtype is not weight.dtype and torch.float64 in (x.dtype, weight.dtype):
        raise ValueError(f"expected an input in {weight.dtype}, the dtype of the weights, got {x.dtype}")
    if torch.compiler.is_compiling():
        return registration.run_traced(backend, plan.chain, x, keep, plan.parameters, plan.buffers)
    from effnet_kernels import block

    return block.run(backend, plan.chain, x, keep, plan.parameters, plan.buffers)


class ChainModule(OperatorModule):
    """Base of the modules that are a chain: a subclass has ``parts``, ``forward_modules`` and ``unknown_part``."""

    def parts(self) -> Parts:
        """What the module computes, where there is no unknown part."""
        raise NotImplementedError

    def unknown_part(self) -> str | None:
        """Which of the inner modules the operators do not know, and why, or None."""
        raise NotImplementedError

    def find_obstacle(self) -> str | None:
        return self.unknown_part() or self.parts().misfit()

    def forward_chain(self, input: Tensor, backend: PrimitivesBackend) -> Tensor:
        return self.run_chain(backend, input, self.planned_parts().draw(input))

    def planned_parts(self) -> Parts:
        """:meth:`parts`, kept for as long as they stay as they are."""
        return self.plan("parts", self.parts)

    def run_chain(self, backend: PrimitivesBackend, input: Tensor, keep: Tensor | None, pool: bool = False) -> Tensor:
        plan = self.plan(("chain", pool), lambda: plan_chain(self.planned_parts(), pool))
        return run_chain(backend, plan, input, keep)

    def kernel_obstacle(self, backend: Backend) -> str | None:
        return self.plan(("obstacle", backend), lambda: self._kernel_obstacle(backend))

    def kernel_reason(self, backend: Backend) -> str:
        return self.plan(("reason", backend), lambda: self._kernel_reason(backend))

    def _kernel_obstacle(self, backend: Backend) -> str | None:
        found = (layer.kernel_obstacle(backend) for layer in self.planned_parts().layers)
        return next((obstacle for obstacle in found if obstacle is not None), None)

    def _kernel_reason(self, backend: Backend) -> str:
        if self.planned_parts().layers[0].kind() == "dense":
            return f"the dense convolution by torch, the rest by {kernels(backend)}"
        return kernels(backend)


def convolution_obstacle(name: str, conv: nn.Conv2d) -> str | None:
    """Why the operators do not compute a convolution, or None."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or tuple(conv.dilation) != (1, 1):
        return f"{name} has a padding mode or a dilation that the operators do not know"
    if any(pair[0] != pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding)):
        return f"{name} has a rectangular kernel, stride or padding"
    if conv.kernel_size[0] == 1 and conv.padding[0] != 0:
        return f"{name} pads a 1x1 convolution"
    return None


def squeeze_layer_obstacle(name: str, conv: nn.Conv2d) -> str | None:
    """Why a convolution is no layer of squeeze-and-excitation, or None."""
    if tuple(conv.kernel_size) != (1, 1) or conv.groups != 1:
        return f"{name} is not a 1x1 convolution"
    return convolution_obstacle(name, conv)
