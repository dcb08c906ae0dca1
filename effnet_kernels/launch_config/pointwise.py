"""Tiles and grids of the pointwise convolution's GEMMs."""

from typing import NamedTuple

import torch

from effnet_kernels.launch_config import Target
from effnet_kernels.launch_config.table import remembered, tuned

# Partials of a channel that statistics leave at most, and partial sums of an image.
MAX_STATISTICS = 256
MAX_SUMS = 8
# What a grid's second dimension holds.
MAX_CHUNKS = 65535


class GemmConfig(NamedTuple):
    """Tiles of rows (pixels) by columns (output channels), and a loop over the inner dimension; ``chunks`` programs
    share the row tiles of an owner (all samples, or one) and a block of columns.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    chunks: int
    num_warps: int
    num_stages: int
    max_registers: int | None


@remembered
def gemm(
    owners: int,
    groups: int,
    rows: int,
    columns: int,
    inner: int,
    partials: int | None,
    loads: bool,
    stores: bool,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """For ``owners`` times ``groups`` groups of ``rows`` rows.

    What is formed on load (``loads``: an activation, a gradient) is formed anew for each block of columns, so that
    these are wide; sums of derivatives on store (``stores``) take the registers of a large tile. Rows shrink until
    there are two programs a multiprocessor. Without ``partials`` each program has one tile; with them, of which an
    owner leaves at most so many, programs walk over tiles, about four to a multiprocessor.
    """
    # A warp group of Hopper's has 128 rows to itself; the operands of other matrix instructions need registers too.
    warps = 4 if target.architecture == 90 or target.backend == "hip" else 8
    if dtype == torch.float32:
        block_rows, block_columns = 64, 64
        # Without matrix units: more threads for the accumulators.
        warps = 8 if target.backend == "cuda" else 4
    elif stores:
        block_rows, block_columns = 64, 64
    elif loads and columns > 64:
        block_rows, block_columns = 64, 128
    else:
        block_rows, block_columns = 128, 64
    if columns <= 32:
        block_columns = 32
        warps = 4 if stores else warps
    # Small tiles are for small batches, so that training needs fewer binaries.
    smallest = 32 if owners * groups * rows <= 2048 else 64
    blocks = -(-columns // block_columns)
    while block_rows > smallest and (
        block_rows >= 2 * rows or owners * groups * blocks * -(-rows // block_rows) < 2 * target.multiprocessors
    ):
        block_rows //= 2
    if block_rows == 32 and dtype != torch.float32:
        warps = 4 if target.backend == "cuda" else 2  # so that a thread still loads 16 bytes
    tile = {
        "block_rows": block_rows,
        "block_columns": block_columns,
        "block_inner": 16 if stores and block_rows == 64 and block_columns == 64 and target.architecture == 90 else 32,
        "num_warps": warps,
        # There is nothing to prefetch in a loop of two trips, and no register for it beside many sums.
        "num_stages": 1 if inner <= 64 or stores else 2,
    }
    sizes = {"owners": owners, "rows": groups * rows, "columns": columns, "inner": inner}
    sizes |= {"loads": loads, "stores": stores}
    tile = tuned("gemm", dtype, target, sizes, tile)
    blocks = -(-columns // tile["block_columns"])
    tiles = groups * -(-rows // tile["block_rows"])
    # One tile a program, or as few as a grid's second dimension allows.
    chunks = -(-tiles // -(-tiles // MAX_CHUNKS))
    if partials is not None:
        chunks = min(tiles, partials, max(1, 4 * target.multiprocessors // (owners * blocks)))
    return GemmConfig(chunks=chunks, max_registers=target.max_registers(), **tile)


class WeightConfig(NamedTuple):
    """Tiles of the weight gradient; ``splits`` programs share the rows of a tile and leave a partial each."""

    block_outputs: int
    block_inputs: int
    block_rows: int
    splits: int
    num_warps: int
    num_stages: int
    max_registers: int | None


# Bytes of partials that a weight gradient may leave.
_PARTIAL_BYTES = 5 << 20


@remembered
def weight_gradient(
    groups: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, target: Target
) -> WeightConfig:
    """About two programs a multiprocessor, as far as the partials' bytes allow."""
    half = dtype != torch.float32
    block_inputs = 128 if half and inputs > 64 and target.backend == "cuda" else 64
    tile = {
        "block_outputs": 64 if outputs > 32 else 32,
        "block_inputs": block_inputs,
        "block_rows": 64 if half and block_inputs == 64 else 32,
        "num_warps": 4 if half or target.backend == "hip" else 8,
        "num_stages": 2,
    }
    tile = tuned("weight_gradient", dtype, target, {"rows": groups * rows, "outputs": outputs, "inputs": inputs}, tile)
    tiles = -(-outputs // tile["block_outputs"]) * -(-inputs // tile["block_inputs"])
    wanted = max(1, 2 * target.multiprocessors // tiles)
    affordable = max(1, _PARTIAL_BYTES // (4 * outputs * inputs))
    splits = min(wanted, affordable, groups * -(-rows // tile["block_rows"]))
    return WeightConfig(splits=splits, max_registers=target.max_registers(), **tile)
