"""The end of a chain on the CPU: its last norm, the stochastic-depth factor, the residual."""

from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    address,
    empty_map,
    execution,
    folded,
    map_address,
    prologue_addresses,
    written,
)
from effnet_kernels.fusion.spec import Prologue


def merge(x: Tensor, prologue: Prologue, residual: Tensor | None, keep: Tensor | None) -> Tensor:
    """``keep[n] * act(scale * x + shift) * gate + residual``: [N, C, H, W] to the same."""
    samples, channels, height, width = x.shape
    out = empty_map(samples, channels, height, width)
    prologue = folded(prologue)
    by_sample = prologue.gate is not None or keep is not None
    extension().merge(
        extension().cut_pixels(samples, height * width, by_sample),
        channels,
        map_address("x", x, samples, channels, height, width),
        prologue_addresses(prologue, samples, channels),
        address("keep", keep, samples),
        map_address("residual", residual, samples, channels, height, width),
        written(out),
        *execution(),
    )
    return out
