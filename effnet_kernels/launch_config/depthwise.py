"""Strips and grids of the depthwise convolution."""

from typing import NamedTuple

import torch

from effnet_kernels.launch_config import Target

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


def forward(
    samples: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    partials: int | None,
    target: Target,
) -> StripConfig:
    """For an output of ``height`` by ``width``: two channels a lane, seven columns.

    The width of every map of an image of 224 is a multiple of seven. Strips are as high as leaves two programs a
    multiprocessor, since each starts with rows that it shares with another.
    """
    strip_width = 7 if stride == 1 and kernel <= 5 else 4
    blocks = -(-channels // 32)
    columns = -(-width // strip_width)

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // 8) * blocks

    rows = height
    while rows > 14 and programs(rows) < 2 * target.multiprocessors:
        rows = -(-rows // 2)
    count = programs(rows) // blocks
    return StripConfig(strip_width, rows, 8, 32, count if partials is None else min(count, partials))


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
    strip_width = 2 if narrow else (7 if stride == 1 else 4)
    strips = 8 if kernel == 3 and dtype != torch.float32 else 4
    blocks = -(-channels // 32)
    columns = -(-width // strip_width)

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // strips) * blocks

    rows = -(-height // stride) * stride
    while rows > 14 and programs(rows) < 2 * target.multiprocessors:
        rows = -(-rows // (2 * stride)) * stride
    count = min(programs(rows) // blocks, max(1, 2 * target.multiprocessors // blocks))
    return StripConfig(strip_width, rows, strips, 32, count)
