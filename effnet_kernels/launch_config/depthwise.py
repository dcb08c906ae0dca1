"""Strips and grids of the depthwise convolution."""

from typing import NamedTuple

import torch

from effnet_kernels.launch_config import Target
from effnet_kernels.launch_config.table import Tile, remembered, tuned

# Partials of a channel that statistics leave at most.
MAX_STATISTICS = 256


class StripConfig(NamedTuple):
    """``strips`` strips of ``width`` columns and ``height`` rows a program, of ``block_channels`` channels."""

    width: int
    height: int
    strips: int
    block_channels: int
    programs: int
    num_warps: int = 4
    num_stages: int = 1


@remembered
def forward(
    samples: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    partials: int | None,
    dtype: torch.dtype,
    target: Target,
) -> StripConfig:
    """For an output of ``height`` by ``width``: two channels a lane, seven columns.

    The width of every map of an image of 224 is a multiple of seven. Strips are high, since each starts with rows that
    it shares with another.
    """
    tile = {"width": 7 if stride == 1 and kernel <= 5 else 4, "strips": 8, "block_channels": 32, "num_warps": 4}
    sizes = {"samples": samples, "channels": channels, "height": height, "width": width, "k": kernel, "stride": stride}
    tile = tuned("depthwise", dtype, target, sizes, tile)
    rows, programs = _strip_rows(samples, channels, height, width, 1, tile, target)
    return StripConfig(height=rows, programs=programs if partials is None else min(programs, partials), **tile)


@remembered
def backward(
    samples: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
    target: Target,
) -> StripConfig:
    """For an input of ``height`` by ``width`` in rows that count from the padding's corner.

    Two windows of ``kernel`` rows and the taps' gradients are in registers: one channel a lane where the kernel is
    large or the values are. Programs walk over several strips, because each leaves a partial weight gradient.
    """
    narrow = kernel == 7 or (stride == 2 and dtype == torch.float32)
    tile = {
        "width": 2 if narrow else (7 if stride == 1 else 4),
        "strips": 8 if kernel == 3 and dtype != torch.float32 else 4,
        "block_channels": 32,
        "num_warps": 4,
    }
    sizes = {"samples": samples, "channels": channels, "height": height, "width": width, "k": kernel, "stride": stride}
    tile = tuned("depthwise_backward", dtype, target, sizes, tile)
    rows, programs = _strip_rows(samples, channels, height, width, stride, tile, target)
    blocks = -(-channels // tile["block_channels"])
    return StripConfig(height=rows, programs=min(programs, max(1, 2 * target.multiprocessors // blocks)), **tile)


def _strip_rows(
    samples: int, channels: int, height: int, width: int, multiple: int, tile: Tile, target: Target
) -> tuple[int, int]:
    """Rows of a strip, as many as leave two programs a multiprocessor, and the programs of a block of channels."""
    blocks = -(-channels // tile["block_channels"])
    columns = -(-width // tile["width"])

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // tile["strips"])

    rows = -(-height // multiple) * multiple
    while rows > 14 and programs(rows) * blocks < 2 * target.multiprocessors:
        rows = -(-rows // (2 * multiple)) * multiple
    return rows, programs(rows)
