"""The layers that the benchmarks run over, as data."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

import effnet_kernels as ek


class Depthwise(NamedTuple):
    """A depthwise layer: input [batch, channels, size, size], kernel, stride, and how often the network has it."""

    channels: int
    size: int
    kernel: int
    stride: int
    count: int

    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.channels * (-(-self.size // self.stride)) ** 2 * self.kernel**2


class Pointwise(NamedTuple):
    """A 1x1 convolution: input [batch, inputs, size, size], and how often the network has it."""

    inputs: int
    outputs: int
    size: int
    count: int

    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.inputs * self.outputs * self.size**2


def depthwise_layers(name: str, resolution: int) -> list[Depthwise]:
    """The distinct depthwise layers of a variant at a resolution, in the network's order."""
    counts = Counter(
        (conv.in_channels, size, conv.kernel_size[0], conv.stride[0])
        for conv, size in _convolutions(name, resolution)
        if conv.groups > 1
    )
    return [Depthwise(*layer, count) for layer, count in counts.items()]


def pointwise_layers(name: str, resolution: int) -> list[Pointwise]:
    """The distinct 1x1 convolutions of a variant at a resolution, in the network's order."""
    counts = Counter(
        (conv.in_channels, conv.out_channels, size)
        for conv, size in _convolutions(name, resolution)
        if conv.kernel_size == (1, 1)
    )
    return [Pointwise(*layer, count) for layer, count in counts.items()]


def _convolutions(name: str, resolution: int) -> Iterator[tuple[nn.Conv2d, int]]:
    """The convolutions of maps, without squeeze-and-excitation's, and the size of each one's input."""
    model, size = getattr(ek, name)(), resolution
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and ".fc" not in path:
            yield module, size
            size = -(-size // module.stride[0])
