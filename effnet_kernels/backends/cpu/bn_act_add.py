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


def bn_act_add(x: Tensor, prologue: Prologue, residual: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    """``drop_path_scale[n] * act(scale * x + shift) * gate + residual``: [N, C, H, W] to the same."""
    samples, channels, height, width = x.shape
    out = empty_map(samples, channels, height, width)
    prologue = folded(prologue)
    by_sample = prologue.gate is not None or drop_path_scale is not None
    extension().bn_act_add(
        extension().partition_pixels(samples, height * width, by_sample),
        channels,
        map_address("x", x, samples, channels, height, width),
        prologue_addresses(prologue, samples, channels),
        address("drop_path_scale", drop_path_scale, samples),
        map_address("residual", residual, samples, channels, height, width),
        written(out),
        *execution(),
    )
    return out
