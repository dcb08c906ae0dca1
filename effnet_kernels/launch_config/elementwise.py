"""Tiles and grids of the kernels that stream over maps, and of those that walk over vectors."""

from typing import NamedTuple

from effnet_kernels.launch_config import Target
from effnet_kernels.launch_config.table import remembered


class StreamConfig(NamedTuple):
    """Tiles of a map's rows (pixels) by channels; ``chunks`` programs share the rows of a group, a tile at a time."""

    block_rows: int
    block_channels: int
    chunks: int
    max_registers: int | None
    num_warps: int = 4


@remembered
def stream(groups: int, rows: int, channels: int, target: Target, partials: int | None = None) -> StreamConfig:
    """For ``groups`` (samples, or 1) of ``rows`` pixels: about eight programs a multiprocessor.

    ``partials`` bounds the chunks of a group, each of which writes a partial result.
    """
    block_channels = 64 if channels > 32 else 32
    block_rows = 4096 // block_channels
    columns = -(-channels // block_channels)
    tiles = -(-rows // block_rows)
    wanted = max(1, 8 * target.multiprocessors // (groups * columns))
    chunks = min(tiles, wanted if partials is None else min(wanted, partials))
    return StreamConfig(block_rows, block_channels, chunks, target.max_registers())


# Squeeze channels that a program holds at most; the family has 4 to 288.
MAX_SQUEEZED = 1024


class ExcitationConfig(NamedTuple):
    """Tiles of the fully connected layers; ``splits`` programs share a sample's channels."""

    block_squeezed: int
    block_channels: int
    splits: int
    num_warps: int = 8


@remembered
def excitation(samples: int, channels: int, squeezed: int, target: Target) -> ExcitationConfig:
    """The hidden layer in one block of 16, 64, 256 or 1024, and a program a multiprocessor where there are channels."""
    block_squeezed = next(size for size in (16, 64, 256, MAX_SQUEEZED) if squeezed <= size)
    block_channels = {16: 256, 64: 128, 256: 32, 1024: 16}[block_squeezed]
    splits = min(-(-channels // block_channels), max(1, target.multiprocessors // samples))
    return ExcitationConfig(block_squeezed, block_channels, splits)
