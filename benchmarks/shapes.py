"""Layers as data: what the benchmarks run over."""

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


def depthwise_layers(name: str, resolution: int) -> list[Depthwise]:
    """The distinct depthwise layers of a variant at a resolution, in the network's order."""
    model = getattr(ek, name)()
    counts: dict[tuple[int, int, int, int], int] = {}
    size = resolution
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or "fc" in repr(module):
            continue
        if module.groups > 1:
            layer = (module.in_channels, size, module.kernel_size[0], module.stride[0])
            counts[layer] = counts.get(layer, 0) + 1
        size = -(-size // module.stride[0])
    return [Depthwise(*layer, count) for layer, count in counts.items()]
