"""The steps of a frozen B0 at 224: GFLOP/s of each, and its share of the peak that the same run measures."""

import functools

import pytest
import torch
from playback import play_back

import effnet_kernels as ek
from effnet_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")

STEPS = 16 + 16 + 2  # depthwise, projections, head and classifier; squeezes and excitations take microseconds


@functools.cache
def profile() -> list:
    rows = ek.freeze(ek.efficientnet_b0()).profile(torch.randn(1, 3, 224, 224), repeat=50)
    return [row for row in rows if row.gflops > 0 and row.name not in ("squeeze", "excite", "scale")]


@pytest.mark.parametrize("step", range(STEPS))
def test_step(benchmark, step: int) -> None:
    row = profile()[step]
    benchmark.group = "steps of a frozen b0"
    benchmark.name = row.name
    play_back(benchmark, [row.milliseconds])
    benchmark.extra_info.update({"GFLOP/s": round(row.gflops, 1), "of peak": round(row.of_peak, 3)})
