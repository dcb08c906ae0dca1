"""Strips and grids of the depthwise convolution."""

from typing import NamedTuple

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
    strip_width = 7 if kernel == 3 or (kernel == 5 and stride == 1) else 4
    blocks = -(-channels // 64)
    columns = -(-width // strip_width)

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // 4) * blocks

    rows = height
    while rows > 14 and programs(rows) < 2 * target.multiprocessors:
        rows = -(-rows // 2)
    count = programs(rows) // blocks
    return StripConfig(strip_width, rows, 4, 64, count if partials is None else min(count, partials))


def backward(
    samples: int, channels: int, height: int, width: int, kernel: int, stride: int, target: Target
) -> StripConfig:
    """For an input of ``height`` by ``width`` in rows that count from the padding's corner.

    Two windows of ``kernel`` rows and the taps' gradients are in registers: one channel a lane where the kernel is
    large. Programs walk over several strips, because each leaves a partial weight gradient.
    """
    strip_width = {1: {3: 7, 5: 7, 7: 2}, 2: {3: 4, 5: 4, 7: 2}}[stride][kernel]
    block_channels = 64 if kernel == 3 else 32
    blocks = -(-channels // block_channels)
    columns = -(-width // strip_width)

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // 4) * blocks

    rows = -(-height // stride) * stride
    while rows > 14 and programs(rows) < 2 * target.multiprocessors:
        rows = -(-rows // (2 * stride)) * stride
    count = min(programs(rows) // blocks, max(1, 2 * target.multiprocessors // blocks))
    return StripConfig(strip_width, rows, 4, block_channels, count)
