"""Tiles and grids of the kernels that stream over maps, and of squeeze-and-excitation's layers."""

from typing import NamedTuple

import torch

from effnet_kernels.backends.base import MAX_SQUEEZED
from effnet_kernels.backends.triton.configs import Target
from effnet_kernels.backends.triton.configs.tuned_configs import cached_rule


class StreamConfig(NamedTuple):
    """Tiles of ``block_m`` rows (pixels) by ``block_c`` channels; ``num_programs`` programs share a group."""

    block_m: int
    block_c: int
    num_programs: int
    max_registers: int | None
    num_warps: int = 4

    def sum_rows(self, dtype: torch.dtype) -> int:
        """The rows of a tile that all threads hold at once, 16 bytes each, of maps of ``dtype``."""
        elements = self.num_warps * 32 * (16 // dtype.itemsize)
        return min(self.block_m, max(1, elements // self.block_c))


@cached_rule
def stream(groups: int, rows: int, channels: int, target: Target, max_partials: int | None = None) -> StreamConfig:
    """For ``groups`` (samples, or 1) of ``rows`` pixels: about eight programs a multiprocessor.

    ``max_partials`` bounds the programs of a group, where each of them writes a partial result. Where it leaves fewer
    than four a multiprocessor, tiles are twice as high, so that as many bytes are on their way.
    """
    block_c = 64 if channels > 32 else 32
    block_m = 4096 // block_c
    blocks = -(-channels // block_c)
    tiles = -(-rows // block_m)
    wanted = max(1, 8 * target.multiprocessors // (groups * blocks))
    num_programs = min(tiles, wanted if max_partials is None else min(wanted, max_partials))
    if groups * blocks * num_programs < 4 * target.multiprocessors and tiles >= 2 * num_programs:
        block_m *= 2
    return StreamConfig(block_m, block_c, num_programs, target.max_registers())


class SumConfig(NamedTuple):
    """Tiles of ``block_p`` partial results by ``block`` elements."""

    block_p: int
    block: int


@cached_rule
def partial_sums(size: int, target: Target) -> SumConfig:
    """For partial results of ``size`` elements: a program a multiprocessor where there are elements enough.

    Each block of partial results waits for the memory of the one before. Eight elements are the 32 bytes that memory
    moves at once.
    """
    block = next((block for block in (128, 32) if size >= block * target.multiprocessors), 8)
    return SumConfig(2048 // block, block)


class ExcitationConfig(NamedTuple):
    """Tiles of the fully connected layers; ``num_programs`` programs share a sample's channels.

    Partial sums of the squeeze are added ``block_t`` at a time.
    """

    block_s: int
    block_c: int
    block_t: int
    num_programs: int
    num_warps: int
    max_registers: int | None


@cached_rule
def excitation(samples: int, partials: int, channels: int, squeezed: int, target: Target) -> ExcitationConfig:
    """For the forward pass, with ``partials`` partial sums of each channel.

    A small batch leaves multiprocessors idle. There, programs have more threads and as many more channels, because each
    block of channels waits for the memory of the one before. So does each block of partial sums.
    """
    block_s, block_c, warps = _blocks(squeezed)
    if warps == 4 and block_c < channels and samples * -(-channels // block_c) < target.multiprocessors:
        block_c, warps = 2 * block_c, 8
    block_t = _BLOCK_T
    if partials > block_t:
        block_c = min(block_c, max(32, 1 << (channels - 1).bit_length()))
        block_t = max(block_t, 2048 // block_c)
    return _excitation(samples, channels, block_s, block_c, block_t, warps, target)


@cached_rule
def excitation_backward(samples: int, channels: int, squeezed: int, target: Target) -> ExcitationConfig:
    block_s, block_c, warps = _blocks(squeezed)
    return _excitation(samples, channels, block_s, block_c, _BLOCK_T, warps, target)


_BLOCK_T = 8


def _blocks(squeezed: int) -> tuple[int, int, int]:
    """Squeezed channels, of which a block has all, channels, and warps."""
    block_s = next(size for size in (16, 64, 256, MAX_SQUEEZED) if squeezed <= size)
    return block_s, {16: 256, 64: 128, 256: 32, 1024: 16}[block_s], 4 if block_s <= 64 else 8


def _excitation(
    samples: int, channels: int, block_s: int, block_c: int, block_t: int, warps: int, target: Target
) -> ExcitationConfig:
    """A program a multiprocessor if there are channels enough."""
    num_programs = min(-(-channels // block_c), max(1, target.multiprocessors // samples))
    return ExcitationConfig(block_s, block_c, block_t, num_programs, warps, target.max_registers())
