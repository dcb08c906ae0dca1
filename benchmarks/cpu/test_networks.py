"""Frozen networks and the training step against each peer that is installed: a process each, asked in turn, medians.

    pytest benchmarks/ --benchmark-only

A row is an engine of a case; `ratio` is its time over ours. The first row of a case times all of its engines, the rows
report these times. `effnet bench` prints the same for any network.
"""

import functools

import pytest
from playback import play_back

from effnet_kernels import bench, cpu

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")

TRAINING = "training step of b0 at 224, batch 16"
# Network, batch, threads, and whether the eager engines, which are slow, are asked too.
CASES = {
    "b0 at 224, batch 1": ("efficientnet_b0", 1, 2, True),
    "b0 at 224, batch 1, one thread": ("efficientnet_b0", 1, 1, False),
    "b0 at 224, batch 16": ("efficientnet_b0", 16, 2, True),
    "lite0 at 224, batch 1": ("efficientnet_lite0", 1, 2, False),
    "b4 at 380, batch 1": ("efficientnet_b4", 1, 2, False),
    "v2-s at 384, batch 1": ("efficientnet_v2_s", 1, 2, False),
    TRAINING: ("efficientnet_b0", 16, 2, True),
}


def engines(case: str) -> tuple[str, ...]:
    name, *_, slow = CASES[case]
    known = bench.engines_of(name, case == TRAINING)
    return known if slow else (bench.OURS, *[peer for peer in bench.PEERS if peer != "torch.compile"])


@functools.cache
def measured(case: str) -> dict[str, bench.Row]:
    name, batch, threads, _ = CASES[case]
    comparison = bench.compare(name, batch, None, threads, engines(case), training=case == TRAINING)
    return {row.engine: row for row in comparison.rows}


@pytest.mark.parametrize(("case", "engine"), [(case, engine) for case in CASES for engine in engines(case)])
def test_network(benchmark, case: str, engine: str) -> None:
    row = measured(case)[engine]
    if row.milliseconds is None:
        pytest.skip(f"{engine}: {row.missing}")
    benchmark.group = case
    play_back(benchmark, [row.milliseconds])
    benchmark.extra_info.update(ratio=row.ratio, error=row.error, MiB=row.memory)
