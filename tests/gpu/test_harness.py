"""Planted faults, which these tests must notice: stores past the end, races, and outputs left uninitialised."""

import pytest
import torch
import triton
import triton.language as tl

from effnet_kernels.backends.triton import launch as seam

simulated = pytest.mark.skipif(not seam.simulated(), reason="a GPU does not notice such faults: run these under ttsem")


@triton.jit(do_not_specialize=["size"])
def copy_kernel(x_ptr, y_ptr, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < (size if MASKED else size + 1)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["size"])
def total_kernel(x_ptr, total_ptr, size, BLOCK: tl.constexpr):
    """Every program adds to the same element, without an atomic."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x_ptr + i, mask=i < size, other=0.0), axis=0)
    tl.store(total_ptr, tl.load(total_ptr) + part)


def copy(x: torch.Tensor, size: int, masked: bool = True, blocks: int | None = None) -> torch.Tensor:
    y = torch.empty_like(x)
    grid = (-(-size // 32) if blocks is None else blocks, 1, 1)
    seam.launcher(copy_kernel)(grid, x_ptr=x, y_ptr=y, size=size, MASKED=masked, BLOCK=32)
    return y


def test_the_planted_kernel_is_right_without_its_fault() -> None:
    x = torch.randn(77, device="cuda")
    assert torch.equal(copy(x, 77), x)


@simulated
def test_a_store_past_the_end_is_noticed() -> None:
    with pytest.raises(Exception, match="past the end"):
        copy(torch.randn(77, device="cuda"), 77, masked=False)


@simulated
def test_a_race_between_programs_is_noticed() -> None:
    x, total = torch.randn(77, device="cuda"), torch.zeros(1, device="cuda")
    with pytest.raises(Exception, match=r"race|another program|instances"):
        seam.launcher(total_kernel)((3, 1, 1), x_ptr=x, total_ptr=total, size=77, BLOCK=32)


def test_uninitialised_memory_is_nan() -> None:
    assert copy(torch.randn(77, device="cuda"), 77, blocks=2)[64:].isnan().all()


def test_a_grid_over_the_limits_is_refused() -> None:
    x = torch.randn(4, device="cuda")
    with pytest.raises(ValueError, match="65535"):
        seam.launcher(copy_kernel)((1, 65536, 1), x_ptr=x, y_ptr=x, size=4, MASKED=True, BLOCK=32)
