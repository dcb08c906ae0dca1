"""Strips and grids of the depthwise convolution."""

from typing import NamedTuple

import torch

from effnet_kernels.backends.triton.configs import Target
from effnet_kernels.backends.triton.configs.tuned_configs import Tile, apply_tuned, cached_rule

# The most partial statistics of a channel that a launch may leave.
MAX_STATISTICS = 256


class StripConfig(NamedTuple):
    """Strips of ``width`` columns and ``height`` rows; ``num_programs`` programs share those of a block of channels.

    A program computes ``strips`` of them at a time, in ``block_c`` channels.
    """

    width: int
    height: int
    strips: int
    block_c: int
    num_programs: int
    num_warps: int = 4
    num_stages: int = 1


@cached_rule
def forward(
    samples: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    max_partials: int | None,
    dtype: torch.dtype,
    target: Target,
) -> StripConfig:
    """The configuration for an output of ``height`` by ``width``.

    A lane has two channels and seven columns, because the width of every map of an image of 224 is a multiple of seven.
    Strips are high, because the first rows of each are computed from input that its neighbour reads, too. At most
    ``max_partials`` programs share a block of channels, where each of them leaves a partial result.

    At inference a small batch may leave multiprocessors idle. Then strips are lower, because what the launch takes is
    the time of their rows, each of which waits for memory, and programs have fewer of them.
    """
    tile = {
        "width": 7 if stride == 1 and kernel <= 5 else 4,
        "strips": 4 if kernel == 5 and stride == 2 and max_partials is not None else 8,
        "block_c": 32,
        "num_warps": 4,
    }
    wanted, lowest = 2 * target.multiprocessors, 14
    few = 3 * target.multiprocessors // 4
    blocks = -(-channels // tile["block_c"])

    def strip_rows() -> tuple[int, int]:
        return _strip_rows(samples, channels, height, width, 1, tile, wanted, lowest)

    if max_partials is None and strip_rows()[1] * blocks < few:
        wanted, lowest = few, 4
        while tile["strips"] > 2 and strip_rows()[1] * blocks < few:
            tile["strips"] //= 2
            tile["num_warps"] //= 2
    sizes = {"samples": samples, "channels": channels, "height": height, "width": width, "k": kernel, "stride": stride}
    tile = apply_tuned("depthwise", dtype, target, sizes, tile)
    rows, programs = strip_rows()
    if max_partials is not None:
        programs = min(programs, max_partials)
    return StripConfig(height=rows, num_programs=programs, **tile)


@cached_rule
def backward(
    samples: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    activates: bool,
    dtype: torch.dtype,
    target: Target,
) -> StripConfig:
    """The configuration for an input of ``height`` by ``width``, counted from the padding's corner.

    Registers hold two windows of ``kernel`` rows and the taps' gradients. Strips of two columns leave registers for
    more programs a multiprocessor, which on an H200 is worth more than the columns that neighbours compute again: 1.1
    to 1.5 times where the input is activated on load (``activates``). Programs walk over several strips, because each
    leaves a partial weight gradient.
    """
    half = dtype != torch.float32
    wide = kernel == 3 and not activates if half else kernel <= 5
    tile = {
        "width": 7 if wide and stride == 1 else 2,
        "strips": 8 if half and kernel <= 5 else 4,
        "block_c": 32,
        "num_warps": 4,
    }
    sizes = {"samples": samples, "channels": channels, "height": height, "width": width, "k": kernel, "stride": stride}
    tile = apply_tuned("depthwise_backward", dtype, target, sizes, tile)
    rows, programs = _strip_rows(samples, channels, height, width, stride, tile, 2 * target.multiprocessors, 14)
    blocks = -(-channels // tile["block_c"])
    at_once = 3 if half and kernel == 3 else 2  # programs that a multiprocessor has registers for
    programs = min(programs, max(1, at_once * target.multiprocessors // blocks))
    return StripConfig(height=rows, num_programs=programs, **tile)


def _strip_rows(
    samples: int, channels: int, height: int, width: int, multiple: int, tile: Tile, wanted: int, lowest: int
) -> tuple[int, int]:
    """The rows of a strip, and the programs for a block of channels.

    The rows are halved until there are ``wanted`` programs, or no more than ``lowest`` rows.
    """
    blocks = -(-channels // tile["block_c"])
    columns = -(-width // tile["width"])

    def programs(rows: int) -> int:
        return -(-samples * columns * -(-height // rows) // tile["strips"])

    rows = -(-height // multiple) * multiple
    while rows > lowest and programs(rows) * blocks < wanted:
        rows = -(-rows // (2 * multiple)) * multiple
    return rows, programs(rows)
