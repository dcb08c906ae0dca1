"""A frozen network on the CPU: its layers as data, and one native call that runs them all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.cpu.extension import extension
from effnet_kernels.cpu.memory import ACTIVATION_INDEX, address, strided_address
from effnet_kernels.deferred import GATES
from effnet_kernels.folded import Layer
from effnet_kernels.operands import as_contiguous, in_memory


class StepProfile(NamedTuple):
    """What one step of a network took."""

    name: str
    multiply_adds: int
    seconds: float


class Network:
    """Layers that run in one native call. Weights are packed here.

    Any number of threads may call one network.

    Raises ValueError where the layers do not fit together.
    """

    def __init__(self, layers: Sequence[Layer], outputs: Sequence[int]) -> None:
        self._channels = layers[0].weight.shape[1]
        # Held by name until they are packed.
        held = [[_canonical(tensor) for tensor in layer.tensors()] for layer in layers]
        described = [_describe(layer, tensors) for layer, tensors in zip(layers, held, strict=True)]
        self._native = extension().Network(described, list(outputs))

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
        if x.dim() != 4 or x.shape[1] != self._channels:
            raise ValueError(f"expected images [N, {self._channels}, H, W], got shape {tuple(x.shape)}")
        batch, _, height, width = x.shape
        sizes = self._native.output_sizes(height, width)
        outputs = [
            torch.empty((batch, *size), dtype=torch.float32, device="cpu", memory_format=memory_format)
            for size in sizes
        ]
        if batch == 0:
            return outputs, None
        views = [strided_address("output", y, *y.shape) for y in outputs]
        x = in_memory(x)
        image = strided_address("x", x, *x.shape)
        steps = self._native.run(image, batch, height, width, views, torch.get_num_threads(), profiled, isa)
        return outputs, steps


def _canonical(tensor: Tensor) -> Tensor:
    return as_contiguous(tensor.detach().to("cpu", torch.float32))


def _describe(layer: Layer, tensors: Sequence[Tensor]) -> dict[str, object]:
    """The layer as the extension takes it."""
    weight, bias, *excitation = tensors
    outputs, channels, kernel = weight.shape[0], weight.shape[1], weight.shape[-1]
    if layer.depthwise and channels != 1:
        raise ValueError(f"weight: expected shape [C, 1, k, k] of a depthwise layer, got {tuple(weight.shape)}")
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
        "weight": address("weight", weight, outputs, channels, kernel, kernel),
        "bias": address("bias", bias, outputs),
        "squeeze": 0,
    }
    if layer.excitation is not None:
        w1, b1, w2, b2 = excitation
        squeezed = w1.shape[0]
        description |= {
            "squeeze": squeezed,
            "squeeze_act": ACTIVATION_INDEX[layer.excitation.act],
            "gate": GATES.index(layer.excitation.gate),
            "w1": address("w1", w1, squeezed, outputs),
            "b1": address("b1", b1, squeezed),
            "w2": address("w2", w2, outputs, squeezed),
            "b2": address("b2", b2, outputs),
        }
    return description
