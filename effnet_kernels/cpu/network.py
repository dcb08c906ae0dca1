"""A frozen network on the CPU: its layers as data, and one native call that runs them all."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.cpu.extension import extension
from effnet_kernels.cpu.memory import ACTIVATION_INDEX, check_float_cpu
from effnet_kernels.deferred import GATES, Activation, Gate, Padding


class Excitation(NamedTuple):
    """Squeeze-and-excitation after a depthwise layer: ``gate(w2 @ act(w1 @ mean + b1) + b2)``."""

    w1: Tensor  # [S, C]
    b1: Tensor  # [S]
    w2: Tensor  # [C, S]
    b2: Tensor  # [C]
    act: Activation
    gate: Gate = "sigmoid"


class Layer(NamedTuple):
    """A convolution with BatchNorm folded into it. Layer i reads tensor i (0 is the image) and makes tensor i + 1.

    Attributes:
        weight: [K, C, k, k], a depthwise one [K, 1, k, k]. A fully connected layer is a 1x1 convolution of one pixel.
        bias: [K].
        depthwise: whether every channel is convolved by itself.
        stride: of both dimensions.
        padding: zeros on the (left, right, top, bottom), or "same" for TensorFlow's.
        act: the activation.
        residual: the tensor added after the activation, or -1.
        pool: whether the output is its own spatial mean; of 1x1 convolutions.
        excitation: what follows a depthwise layer, or None.
    """

    weight: Tensor
    bias: Tensor
    depthwise: bool = False
    stride: int = 1
    padding: Padding | Literal["same"] = (0, 0, 0, 0)
    act: Activation = "none"
    residual: int = -1
    pool: bool = False
    excitation: Excitation | None = None

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias, *(self.excitation or ())[:4]]


class StepProfile(NamedTuple):
    """What one step of a network took."""

    name: str
    multiply_adds: int
    seconds: float


class Network:
    """Layers that run in one native call. Weights are packed here and kept in that form alone.

    Any number of threads may call one network. Pickling writes the weights as they came.

    Raises ValueError where the layers do not fit together.
    """

    def __init__(self, layers: Sequence[Layer], outputs: Sequence[int]) -> None:
        self._layers = [_without_weights(layer) for layer in layers]
        self._outputs = list(outputs)
        # Held by name until they are packed.
        held = [[_canonical(tensor) for tensor in layer.tensors()] for layer in layers]
        described = [_describe(layer, tensors) for layer, tensors in zip(layers, held, strict=True)]
        self._native = extension().Network(described, self._outputs)

    def layers(self) -> list[Layer]:
        """The layers with their weights, unpacked."""
        return [self._with_weights(index, layer) for index, layer in enumerate(self._layers)]

    def output_sizes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(channels, height, width) of every output for images of this size."""
        return self._native.output_sizes(height, width)

    def run(
        self, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format, isa: str | None = None
    ) -> list[Tensor]:
        """The outputs [N, K, H', W'] for images x [N, C, H, W], float32, on the CPU, in any strides."""
        outputs, _ = self._call(x, memory_format, False, isa)
        return outputs

    def profile(self, x: Tensor) -> list[StepProfile]:
        """What each step takes for images x."""
        _, steps = self._call(x, torch.contiguous_format, True)
        return [StepProfile(*step) for step in steps or ()]

    def _call(
        self, x: Tensor, memory_format: torch.memory_format, profiled: bool, isa: str | None = None
    ) -> tuple[list[Tensor], list[tuple[str, int, float]] | None]:
        check_float_cpu("x", x)
        channels = self._layers[0].weight.shape[1]
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"expected images [N, {channels}, H, W], got shape {tuple(x.shape)}")
        batch, _, height, width = x.shape
        sizes = self._native.output_sizes(height, width)
        outputs = [torch.empty((batch, *size), memory_format=memory_format) for size in sizes]
        if batch == 0:
            return outputs, None
        views = [(y.data_ptr(), *y.stride()) for y in outputs]
        image = (x.data_ptr(), *x.stride())
        steps = self._native.run(image, batch, height, width, views, torch.get_num_threads(), profiled, isa)
        return outputs, steps

    def _with_weights(self, index: int, layer: Layer) -> Layer:
        tensors = [torch.empty(tensor.shape) for tensor in layer.tensors()]
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._native.unpack_layer(index, *addresses, *[0] * (6 - len(addresses)))
        return _replace_tensors(layer, tensors)

    def __reduce__(self) -> Any:
        return Network, (self.layers(), self._outputs)


def _canonical(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _without_weights(layer: Layer) -> Layer:
    return _replace_tensors(layer, [torch.empty(tensor.shape, device="meta") for tensor in layer.tensors()])


def _replace_tensors(layer: Layer, tensors: Sequence[Tensor]) -> Layer:
    weight, bias, *rest = tensors
    excitation = layer.excitation
    if excitation is not None:
        w1, b1, w2, b2 = rest
        excitation = excitation._replace(w1=w1, b1=b1, w2=w2, b2=b2)
    return layer._replace(weight=weight, bias=bias, excitation=excitation)


def _describe(layer: Layer, tensors: Sequence[Tensor]) -> dict[str, object]:
    """The layer as the extension takes it."""
    weight, bias, *excitation = tensors
    outputs, channels, kernel = weight.shape[0], weight.shape[1], weight.shape[-1]
    description: dict[str, object] = {
        "depthwise": layer.depthwise,
        "in_channels": outputs if layer.depthwise else channels,
        "out_channels": outputs,
        "kernel": kernel,
        "stride": layer.stride,
        "padding": None if layer.padding == "same" else tuple(layer.padding),
        "act": ACTIVATION_INDEX[layer.act],
        "residual": layer.residual,
        "pool": layer.pool,
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "squeeze": 0,
    }
    if layer.excitation is not None:
        w1, b1, w2, b2 = (tensor.data_ptr() for tensor in excitation)
        description |= {
            "squeeze": excitation[0].shape[0],
            "squeeze_act": ACTIVATION_INDEX[layer.excitation.act],
            "gate": GATES.index(layer.excitation.gate),
            "w1": w1,
            "b1": b1,
            "w2": w2,
            "b2": b2,
        }
    return description
