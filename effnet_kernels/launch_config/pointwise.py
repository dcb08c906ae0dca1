"""Tiles and grids of the pointwise convolution's GEMMs."""

from typing import NamedTuple

import torch

from effnet_kernels.launch_config import Target

# Partials of a channel that statistics leave at most, and partial sums of an image.
MAX_STATISTICS = 256
MAX_SUMS = 8


class GemmConfig(NamedTuple):
    """Tiles of rows (pixels) by columns (output channels), and a loop over the inner dimension; ``chunks`` programs
    share the row tiles of an owner (all samples, or one) and a block of columns.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    chunks: int
    num_warps: int = 8
    num_stages: int = 2


def gemm(
    owners: int,
    groups: int,
    rows: int,
    columns: int,
    inner: int,
    partials: int | None,
    heavy: bool,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """For ``owners`` times ``groups`` groups of ``rows`` rows.

    Tiles shrink until there are two programs a multiprocessor. Without ``partials`` each program has one tile; with
    them, of which an owner leaves at most so many, programs walk over tiles, about four to a multiprocessor. What is
    ``heavy``, with an activation on load or sums of its derivatives on store, has no registers for large tiles.
    """
    block_columns = 64 if columns > 32 else 32
    blocks = -(-columns // block_columns)
    large = not heavy and dtype != torch.float32
    block_inner = 64 if inner > 64 and block_columns == 64 and large else 32
    block_rows = 128 if large else 64
    # Small tiles are for small batches, so that training needs fewer binaries.
    smallest = 32 if owners * groups * rows <= 2048 else 64
    while block_rows > smallest and (
        block_rows >= 2 * rows or owners * groups * blocks * -(-rows // block_rows) < 2 * target.multiprocessors
    ):
        block_rows //= 2
    tiles = groups * -(-rows // block_rows)
    chunks = tiles
    if partials is not None:
        chunks = min(tiles, partials, max(1, 4 * target.multiprocessors // (owners * blocks)))
    # A wavefront of AMD's data center GPUs has 64 lanes.
    return GemmConfig(block_rows, block_columns, block_inner, chunks, 8 if target.backend == "cuda" else 4)


class WeightConfig(NamedTuple):
    """Tiles of the weight gradient; ``splits`` programs share the rows of a tile and leave a partial each."""

    block_outputs: int
    block_inputs: int
    block_rows: int
    splits: int
    num_warps: int = 8
    num_stages: int = 2


# Bytes of partials that a weight gradient may leave.
_PARTIAL_BYTES = 8 << 20


def weight_gradient(
    groups: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, target: Target
) -> WeightConfig:
    """About two programs a multiprocessor, as far as the partials' bytes allow."""
    block_outputs = 64 if outputs > 32 else 32
    block_inputs = 64
    block_rows = 64 if dtype != torch.float32 else 32
    tiles = -(-outputs // block_outputs) * -(-inputs // block_inputs)
    wanted = max(1, 2 * target.multiprocessors // tiles)
    affordable = max(1, _PARTIAL_BYTES // (4 * outputs * inputs))
    splits = min(wanted, affordable, groups * -(-rows // block_rows))
    return WeightConfig(block_outputs, block_inputs, block_rows, splits)
