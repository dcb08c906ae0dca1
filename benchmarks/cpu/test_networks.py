"""Frozen networks and the training step against the baselines installed: a process each, asked in turn, medians.

    pytest benchmarks/ --benchmark-only

A row is an engine of a case; `ratio` is its time over ours. The first row of a case times all of its engines, the rows
report these times. `effnet bench` prints the same for any network.
"""

import functools

import pytest
from playback import play_back

from effnet_kernels.backends import cpu
from effnet_kernels.tools import bench

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")

TRAINING = "training step of b0 at 224, batch 16"
TIMM_TRAINING = "training step of timm's tf_b0 at 224, batch 16"
# Network, batch, threads, and the engines: all, those that serve, or the eager one, untouched and accelerated.
CASES = {
    "b0 at 224, batch 1": ("efficientnet_b0", 1, 2, "all"),
    "b0 at 224, batch 1, one thread": ("efficientnet_b0", 1, 1, "serve"),
    "b0 at 224, batch 16": ("efficientnet_b0", 16, 2, "all"),
    "lite0 at 224, batch 1": ("efficientnet_lite0", 1, 2, "serve"),
    "b4 at 380, batch 1": ("efficientnet_b4", 1, 2, "serve"),
    "v2-s at 384, batch 1": ("efficientnet_v2_s", 1, 2, "serve"),
    "timm's tf_b0 at 224, batch 16": ("tf_efficientnet_b0", 16, 2, "eager"),
    TIMM_TRAINING: ("tf_efficientnet_b0", 16, 2, "eager"),
    TRAINING: ("efficientnet_b0", 16, 2, "all"),
}


def engines(case: str) -> tuple[str, ...]:
    name, *_, choice = CASES[case]
    if choice == "serve":
        return bench.OURS, bench.OURS_BF16, *bench.FROM_ONNX
    known = bench.engines_of(name, trains(case))
    return known if choice == "all" else tuple(engine for engine in known if engine not in bench.BASELINES)


def trains(case: str) -> bool:
    return case in (TRAINING, TIMM_TRAINING)


@functools.cache
def measured(case: str) -> dict[str, bench.Row]:
    name, batch, threads, _ = CASES[case]
    comparison = bench.compare(name, batch, None, threads, engines(case), training=trains(case))
    return {row.engine: row for row in comparison.rows}


@pytest.mark.parametrize(("case", "engine"), [(case, engine) for case in CASES for engine in engines(case)])
def test_network(benchmark, case: str, engine: str) -> None:
    row = measured(case)[engine]
    if row.milliseconds is None:
        pytest.skip(f"{engine}: {row.missing}")
    benchmark.group = case
    play_back(benchmark, [row.milliseconds])
    benchmark.extra_info.update(ratio=row.ratio, error=row.error, MiB=row.memory, dtype=row.dtype)
