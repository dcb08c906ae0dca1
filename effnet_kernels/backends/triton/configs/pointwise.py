"""Tiles and grids of the pointwise convolution's GEMMs."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from effnet_kernels.backends.triton.configs import Target
from effnet_kernels.backends.triton.configs.tuned_configs import apply_tuned, cached_rule

# The most partial statistics of a channel that a launch may leave, and the most partial sums of an image.
MAX_STATISTICS = 256
MAX_SUMS = 8
# The most programs of a grid's second dimension.
MAX_GRID_Y = 65535


class GemmConfig(NamedTuple):
    """Tiles of ``block_m`` rows (pixels) by ``block_n`` columns (channels of the result).

    The inner dimension is summed ``block_k`` at a time. ``num_programs`` programs share the row tiles of an owner and a
    block of columns; :func:`gemm` says what an owner is.
    """

    block_m: int
    block_n: int
    block_k: int
    num_programs: int
    num_warps: int
    num_stages: int
    max_registers: int | None


@cached_rule
def gemm(
    owners: int,
    groups: int,
    rows: int,
    columns: int,
    inner: int,
    max_partials: int | None,
    computes_on_load: bool,
    sums_on_store: bool,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """The configuration for ``owners`` times ``groups`` groups of ``rows`` rows.

    A tile never crosses a group, and partial results never cross an owner: one sample where a result is by sample, else
    the whole batch. An activation or a gradient that is computed on load (``computes_on_load``) is computed again for
    each block of columns, so that these are wide. Sums of derivatives on store (``sums_on_store``) need so many
    registers that tiles are small. Tiles lose rows until there are two programs a multiprocessor.

    Without ``max_partials`` each program has one tile. With it, an owner gets at most so many partial results, and
    about four programs a multiprocessor walk over the tiles.
    """
    if dtype != torch.float32 and target.architecture == 90:
        tile = _hopper_tile(columns, inner, max_partials, computes_on_load, sums_on_store)
    else:
        tile = _tile(columns, inner, computes_on_load, sums_on_store, dtype, target)

    def programs(columns_a_program: int, rows_a_program: int) -> int:
        return owners * groups * -(-columns // columns_a_program) * -(-rows // rows_a_program)

    # Few rows need narrow tiles, so that there are programs enough.
    if tile["block_n"] == 128 and programs(128, 64) < 2 * target.multiprocessors:
        tile["block_n"] = 64
    # Only small batches get small tiles, so that training needs fewer binaries.
    smallest = 32 if owners * groups * rows <= 2048 else 64
    while tile["block_m"] > smallest and (
        tile["block_m"] >= 2 * rows or programs(tile["block_n"], tile["block_m"]) < 2 * target.multiprocessors
    ):
        tile["block_m"] //= 2
    if tile["block_m"] == 32:
        # So that each thread still loads 16 bytes.
        tile["block_k"] = max(tile["block_k"], 32)
        if dtype != torch.float32:
            tile["num_warps"] = 4 if target.backend == "cuda" else 2
    # Statistics are of a training pass.
    trains = computes_on_load or sums_on_store or max_partials == MAX_STATISTICS
    if not trains and dtype != torch.float32 and target.backend == "cuda":
        _fill(tile, inner, programs, target)
    sizes = {"owners": owners, "rows": groups * rows, "columns": columns, "inner": inner}
    sizes |= {"loads": computes_on_load, "stores": sums_on_store}
    tile = apply_tuned("gemm", dtype, target, sizes, tile)
    blocks = -(-columns // tile["block_n"])
    tiles = groups * -(-rows // tile["block_m"])
    # One tile a program, or as few tiles as a grid's second dimension allows.
    num_programs = -(-tiles // -(-tiles // MAX_GRID_Y))
    if max_partials is not None:
        num_programs = min(tiles, max_partials, max(1, 4 * target.multiprocessors // (owners * blocks)))
    return GemmConfig(num_programs=num_programs, max_registers=target.max_registers(), **tile)


# What all GPUs have, at the least, for a block: 99 KiB but what the compiler takes itself.
_SHARED_BYTES = 96 << 10


def _fill(tile: dict[str, int], inner: int, programs: Callable[[int, int], int], target: Target) -> None:
    """Makes the tile of a small batch smaller, where it leaves multiprocessors idle.

    What such a launch takes is the time of its steps, each of which waits for memory. So steps are few and long, and
    loads run ahead of all of them. A warp has 16 by 16 elements of the result, the least that matrix units take.
    """
    wanted = 3 * target.multiprocessors // 4
    block_m, block_n = tile["block_m"], tile["block_n"]
    if programs(block_n, block_m) >= wanted:
        return
    while programs(block_n, block_m) < wanted and max(block_m, block_n) > 16:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    block_k = min(128, max(32, 1 << (inner - 1).bit_length()))
    tile |= {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    tile["num_warps"] = block_m * block_n // 256
    # All stages but one are in shared memory at a time, and weights may be in float32.
    stages = 1 + _SHARED_BYTES // (block_k * (2 * block_m + 4 * block_n))
    tile["num_stages"] = min(4, stages, -(-inner // block_k))


def _hopper_tile(
    columns: int, inner: int, max_partials: int | None, computes_on_load: bool, sums_on_store: bool
) -> dict[str, int]:
    """For maps in 16 bits: what was fastest on an H200 for the layers of B0 at a batch of 256, of about 60 tiles each.

    Where there are steps enough, loads run ahead of them by up to three, which hides the memory's latency.
    """
    warps = 4
    if sums_on_store:
        block_m, block_n, block_k, stages = (128, 32, 32, 1) if columns <= 32 else (64, 64, 32, 1)
    elif columns <= 16:
        block_m, block_n, block_k, stages = 128, 16, 32, 1 if max_partials is None else 2
    elif columns <= 32:
        block_m, block_n, block_k, stages = 128, 32, 32, 3
    elif inner <= 64 and not computes_on_load:
        # Many programs at once instead of many steps; where all of them leave statistics, that takes small ones.
        block_m, block_n, block_k, stages = (128, 32, 32, 1) if max_partials is None else (64, 64, 32, 1)
        warps = 4 if max_partials is None else 2
    elif columns <= 64:
        block_m, block_n, block_k, stages = 128, 64, 32, 3
    elif computes_on_load or max_partials is None:
        block_m, block_n, block_k, stages = 64, 128, 64 if inner > columns and max_partials is None else 32, 3
    else:
        block_m, block_n, block_k, stages = 128, 64, 32 if inner <= 96 else 64, 3
    return {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}


def _tile(
    columns: int, inner: int, computes_on_load: bool, sums_on_store: bool, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """For other GPUs, and for float32, by the compiler's reports: no spills, and accesses of 16 bytes."""
    # Operands of matrix instructions need registers, too, but on Hopper.
    warps = 4 if target.architecture == 90 or target.backend == "hip" else 8
    if dtype == torch.float32:
        block_m, block_n = 64, 64
        # There are no matrix units for float32, so that accumulators are spread over more threads.
        warps = 8 if target.backend == "cuda" else 4
    elif sums_on_store:
        block_m, block_n = 64, 64
    elif computes_on_load and columns > 64:
        block_m, block_n = 64, 128
    else:
        block_m, block_n = 128, 64
    if columns <= 32:
        block_n = 32
        warps = 4 if sums_on_store else warps
    # A loop of two trips gains nothing from prefetching, and beside many sums there are no registers for it.
    stages = 1 if inner <= 64 or sums_on_store else 2
    block_k = 16 if sums_on_store and block_n == 64 and target.architecture == 90 else 32
    return {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}


class WeightConfig(NamedTuple):
    """Tiles of ``block_m`` output by ``block_n`` input channels, summed over rows (pixels) ``block_k`` at a time.

    ``split_k`` programs share the rows of a tile, and each of them leaves a partial weight gradient.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None


# The most bytes of partial weight gradients that a launch may leave.
_PARTIAL_BYTES = 10 << 20


@cached_rule
def weight_gradient(
    groups: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, target: Target
) -> WeightConfig:
    """About two programs a multiprocessor, on Hopper four, or fewer where partial results would take too many bytes."""
    hopper = dtype != torch.float32 and target.architecture == 90
    tile = _hopper_weight_tile(outputs, inputs) if hopper else _weight_tile(outputs, inputs, dtype, target)
    tile = apply_tuned(
        "weight_gradient", dtype, target, {"rows": groups * rows, "outputs": outputs, "inputs": inputs}, tile
    )
    tiles = -(-outputs // tile["block_m"]) * -(-inputs // tile["block_n"])
    wanted = max(1, (4 if hopper else 2) * target.multiprocessors // tiles)
    affordable = max(1, _PARTIAL_BYTES // (4 * outputs * inputs))
    split_k = min(wanted, affordable, groups * -(-rows // tile["block_k"]))
    return WeightConfig(split_k=split_k, max_registers=target.max_registers(), **tile)


def _hopper_weight_tile(outputs: int, inputs: int) -> dict[str, int]:
    """Chosen as :func:`_hopper_tile` is."""
    if inputs <= 32:
        block_m, block_n, block_k, stages = 64, 32, 64, 3
    elif outputs <= 32:
        block_m, block_n, block_k, stages = 32, 128, 64, 2
    else:
        block_m, block_n, block_k, stages = 64, 64 if inputs <= 64 else 128, 32, 3
    return {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": 4, "num_stages": stages}


def _weight_tile(outputs: int, inputs: int, dtype: torch.dtype, target: Target) -> dict[str, int]:
    half = dtype != torch.float32
    block_n = 128 if half and inputs > 64 and target.backend == "cuda" else 64
    return {
        "block_m": 64 if outputs > 32 else 32,
        "block_n": block_n,
        "block_k": 64 if half and block_n == 64 else 32,
        "num_warps": 4 if half or target.backend == "hip" else 8,
        "num_stages": 2,
    }
