"""Rows of pytest-benchmark whose times were taken elsewhere, where contenders could be asked in turn."""

from collections.abc import Sequence


def play_back(benchmark, milliseconds: Sequence[float]) -> None:
    """Makes the row report these times, one a round."""
    seconds = [1e-3 * t for t in milliseconds]
    ticks = iter([tick for t in seconds for tick in (0.0, t)])
    benchmark._timer = lambda: next(ticks)
    benchmark._calibrate_timer = lambda *arguments, **options: None
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
