"""Modules read as chains of convolutions, whoever's modules they are."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion.geometry import resolve_padding
from effnet_kernels.fusion.inspection import Unsupported
from effnet_kernels.fusion.packing import PackedChains
from effnet_kernels.fusion.spec import Activation, BatchNorm, Chain, Excitation, Gate, Layer, LayerKind, Padding


class ChainSpec(NamedTuple):
    """What a module computes: a chain of convolutions, and the stochastic depth of its residual branch.

    Attributes:
        chain: the convolutions, with the module's own tensors.
        drop_path: draws stochastic depth's factors [N] for a call's arguments, or returns None where they would change
            nothing.
        packed: the chain as it was packed for inference on the CPU; None where nobody keeps the specification.
        plans: what the chain's passes launch on a GPU, likewise.
    """

    chain: Chain
    drop_path: Callable[..., Tensor | None] | None = None
    packed: PackedChains | None = None
    plans: Plans | None = None

    def drop_path_scale(self, *arguments: Any, **named: Any) -> Tensor | None:
        """Stochastic depth's factors [N] for a call; None where there is no residual for a sample to keep."""
        return None if self.drop_path is None or not self.chain.residual else self.drop_path(*arguments, **named)


def lower_layer(
    name: str,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | nn.SyncBatchNorm,
    act: Activation,
    padding: int | Padding | Literal["same"],
    skip_nonfinite: bool = False,
) -> Layer:
    """A convolution, its BatchNorm and its activation.

    Args:
        name: of the convolution, for errors.
        padding: as the module pads; ``conv``'s own is not asked.

    Raises Unsupported for a convolution that no kernel computes, and where tensors do not have the shapes that the
    modules' settings say.
    """
    check_convolution(name, conv)
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    if tuple(conv.weight.shape) != shape:
        raise Unsupported(f"{name}: its weight has the shape {tuple(conv.weight.shape)}, expected {shape}")
    for vector in (conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if vector is not None and tuple(vector.shape) != shape[:1]:
            raise Unsupported(
                f"{name}: it has a bias, or its norm has a vector, of shape {tuple(vector.shape)}, expected {shape[:1]}"
            )
    if (norm.running_mean is None) != (norm.running_var is None):
        raise Unsupported(f"{name}: its norm has one of running_mean and running_var")
    _check_numbers(name, norm)
    return Layer(
        kind=_kind_of(name, conv),
        weight=conv.weight,
        bias=conv.bias,
        stride=conv.stride[0],
        padding=padding if isinstance(padding, str) else resolve_padding(padding, (0, 0), 1, 1),
        norm=BatchNorm(
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.num_batches_tracked,
            norm.eps,
            norm.momentum,
            # As torch decides it.
            batch_statistics=norm.training or (norm.running_mean is None and norm.running_var is None),
            tracks=norm.training and norm.track_running_stats,
            skip_nonfinite=skip_nonfinite,
            process_group=_process_group(norm),
        ),
        act=act,
    )


def _check_numbers(name: str, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> None:
    """Raises Unsupported for an eps or a momentum that is no number, and for an eps that torch refuses."""
    for setting, value in (("eps", norm.eps), ("momentum", 0.0 if norm.momentum is None else norm.momentum)):
        if not isinstance(value, (int, float)):
            raise Unsupported(f"{name}: its norm's {setting} is a {type(value).__name__}, not a number")
    if norm.training and norm.eps <= 0.0:
        raise Unsupported(f"{name}: its norm's eps is {norm.eps}")


def _process_group(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> str | None:
    """The name of the processes that a norm synchronises with; None for one that does not."""
    if isinstance(norm, nn.BatchNorm2d) or not norm.training:
        return None
    return "" if norm.process_group is None else norm.process_group.group_name


def lower_excitation(
    names: tuple[str, str], fc1: nn.Conv2d, fc2: nn.Conv2d, act: Activation, gate: Gate = "sigmoid"
) -> Excitation:
    """Squeeze-and-excitation's two layers, with their names for errors.

    Raises Unsupported where they are no 1x1 convolutions or their tensors have other shapes than their settings say.
    """
    for name, fc in zip(names, (fc1, fc2), strict=True):
        if tuple(fc.kernel_size) != (1, 1) or fc.groups != 1:
            raise Unsupported(f"{name} is not a 1x1 convolution")
        check_convolution(name, fc)
        if fc.out_channels == 0:
            raise Unsupported(f"{name} has no channels")
        shape = (fc.out_channels, fc.in_channels, 1, 1)
        if tuple(fc.weight.shape) != shape or (fc.bias is not None and tuple(fc.bias.shape) != shape[:1]):
            raise Unsupported(f"{name}: its weight has the shape {tuple(fc.weight.shape)}, expected {shape}")
    return Excitation(fc1.weight, fc1.bias, fc2.weight, fc2.bias, act, gate)


def lower_chain(layers: Sequence[Layer], residual: bool) -> Chain:
    """The layers as one chain; raises Unsupported where they do not fit one another, so that torch would fail too."""
    if not layers:
        raise Unsupported("it has no convolutions")
    for index, layer in enumerate(layers):
        if index > 0 and layer.kind == "dense":
            raise Unsupported(f"convolution {index} is neither a 1x1 nor a depthwise one")
        if index > 0 and layer.in_channels != layers[index - 1].out_channels:
            raise Unsupported(
                f"convolution {index} has {layer.in_channels} input channels, and {layers[index - 1].out_channels} come"
            )
        if residual and not _keeps_size(layer):
            raise Unsupported(f"convolution {index} changes the size of the map, to which the residual is added")
        if layer.excitation is not None:
            behind = layers[index + 1 : index + 2]
            if not behind or behind[0].kind != "pointwise":
                raise Unsupported("squeeze-and-excitation is not followed by a 1x1 convolution")
            _check_excitation(layer.excitation, layer.out_channels)
    averaging = [layer.norm.running_mean for layer in layers if layer.norm is not None and layer.norm.momentum is None]
    if any(a is b and a is not None for a, b in itertools.combinations(averaging, 2)):
        raise Unsupported("two of its norms are one, whose running statistics average over all batches")
    first, last = layers[0], layers[-1]
    if residual and first.in_channels != last.out_channels:
        raise Unsupported(f"a residual of {first.in_channels} channels is added to {last.out_channels}")
    return Chain(tuple(layers), residual)


def check_convolution(name: str, conv: nn.Conv2d) -> None:
    """Raises Unsupported for a convolution that no kernel computes."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or tuple(conv.dilation) != (1, 1):
        raise Unsupported(f"{name} has a padding mode or a dilation that no kernel computes")
    if any(pair[0] != pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding)):
        raise Unsupported(f"{name} has a rectangular kernel, stride or padding")
    if conv.kernel_size[0] == 1 and conv.padding[0] != 0:
        raise Unsupported(f"{name} pads a 1x1 convolution")


def _kind_of(name: str, conv: nn.Conv2d) -> LayerKind:
    if conv.groups == 1:
        return "pointwise" if tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) == (1, 1) else "dense"
    if conv.groups == conv.in_channels == conv.out_channels and conv.bias is None:
        return "depthwise"
    raise Unsupported(f"{name} is a grouped convolution, or a depthwise one with a bias")


def _keeps_size(layer: Layer) -> bool:
    """Whether a map of any size keeps its size."""
    if layer.stride != 1:
        return False
    if isinstance(layer.padding, str):
        return True
    left, right, top, bottom = layer.padding
    return left + right == top + bottom == layer.kernel_size - 1


def _check_excitation(excitation: Excitation, channels: int) -> None:
    squeezed = excitation.reduce_weight.shape[0]
    for name, weight, shape in (
        ("first", excitation.reduce_weight, (squeezed, channels, 1, 1)),
        ("second", excitation.expand_weight, (channels, squeezed, 1, 1)),
    ):
        if tuple(weight.shape) != shape:
            raise Unsupported(
                f"squeeze-and-excitation's {name} layer has a weight {tuple(weight.shape)}, expected {shape}"
            )
