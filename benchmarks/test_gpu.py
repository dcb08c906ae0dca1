"""Networks and operators on a GPU, against torchvision, timm and torch.compile.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE]

A row is a contender of a case. The first row of a case times all of its contenders in turn, by CUDA events with the
cache overwritten before each call; the rows report these times. ``.benchmarks/gpu.json`` and ``gpu.svg`` are written at
the end. Without a GPU the rows are skipped; under ttsem they run at toy sizes, for the code's sake.
"""

import functools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.language", reason="Triton is not installed")

import gpu_cases
from playback import play_back

from effnet_kernels.backends.triton.launch import simulated
from effnet_kernels.tools import timing

TOY = simulated()
SKIP = None if TOY or torch.cuda.is_available() else "torch finds no GPU"
pytestmark = pytest.mark.skipif(SKIP is not None, reason=f"{SKIP}")
ROUNDS, WARM = (1, 0) if TOY else (20, 5)
RESULTS = Path(__file__).parents[1] / ".benchmarks"


@functools.cache
def all_cases() -> dict[str, gpu_cases.Case]:
    return {} if SKIP else {case.name: case for case in gpu_cases.cases(TOY)}


def rows() -> list[tuple[str, str]]:
    return [(case.name, contender) for case in all_cases().values() for contender in case.names] or [("-", "-")]


class Measured:
    """The times of the cases measured so far; a case is measured when its first row asks."""

    def __init__(self) -> None:
        self.cases: dict[str, dict[str, dict]] = {}
        self.bandwidth = 0.0 if TOY else timing.copy_bandwidth()

    def of(self, name: str) -> dict[str, dict]:
        if name not in self.cases:
            self.cases[name] = self._measure(all_cases()[name])
            gpu_cases.release()
        return self.cases[name]

    def _measure(self, case: gpu_cases.Case) -> dict[str, dict]:
        found: dict[str, dict] = {}
        calls = {}
        for contender, make in case.build().items():
            try:
                calls[contender] = make()
                found[contender] = {"peak MB": _peak(calls[contender])}
            except Exception as error:  # a baseline that cannot run gets a row with its error
                if contender.startswith("ours"):
                    raise
                calls.pop(contender, None)
                found[contender] = {"error": f"{type(error).__name__}: {error}"[:300]}
        _agree(calls)
        floor = gpu_cases.bytes_of(calls["ours"])
        for contender, milliseconds in timing.interleaved(calls, ROUNDS, WARM).items():
            median = statistics.median(milliseconds)
            found[contender] |= {
                "ms": milliseconds,
                "images/s": 1e3 * case.images / median,
                # The bytes are those of our launches, so that a baseline's rate is that of moving as many.
                "GB/s": floor / median / 1e6,
                "of copy": floor / median / 1e-3 / self.bandwidth if self.bandwidth else 0.0,
            }
        return found


def _agree(calls) -> None:
    """Operators are timed only where their gradients are eager's; networks have weights of their own (see selftest)."""
    eager = calls.get("eager channels-last")
    if eager is not None:
        ours, theirs = (torch.cat([g.float().flatten() for g in call()]) for call in (calls["ours"], eager))
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 0.02, f"the gradients differ from eager's by {error:.2e}"


def _peak(call) -> float:
    if TOY:
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@pytest.fixture(scope="session")
def measured() -> Iterator[Measured]:
    results = Measured()
    yield results
    RESULTS.mkdir(exist_ok=True)
    device = "simulated: times mean nothing" if TOY else torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "copy GB/s": results.bandwidth / 1e9, "cases": results.cases}
    (RESULTS / "gpu.json").write_text(json.dumps(facts, indent=1))
    (RESULTS / "gpu.svg").write_text(picture(device, results.cases))


@pytest.mark.parametrize(("case", "contender"), rows())
def test_gpu(benchmark, measured: Measured, case: str, contender: str) -> None:
    row = measured.of(case)[contender]
    if "error" in row:
        pytest.skip(f"{contender} does not run here: {row['error']}")
    benchmark.group = case
    play_back(benchmark, row["ms"])
    benchmark.extra_info.update({key: round(value, 3) for key, value in row.items() if key != "ms"})


def picture(device: str, cases: dict[str, dict[str, dict]]) -> str:
    """Images a second of each contender, as horizontal bars by case."""
    lines, y = [f'<text x="8" y="20" font-size="15">images/s, {device}</text>'], 48
    for name, contenders in cases.items():
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{name}</text>')
        timed = {contender: row["images/s"] for contender, row in contenders.items() if "images/s" in row}
        for contender, rate in timed.items():
            y += 22
            width = 420 * rate / max(timed.values())
            colour = "#2f6fb0" if contender.startswith("ours") else "#9a9a9a"
            lines.append(f'<text x="236" y="{y + 11}" text-anchor="end">{contender}</text>')
            lines.append(f'<rect x="244" y="{y - 3}" width="{width:.1f}" height="18" fill="{colour}"/>')
            lines.append(f'<text x="{250 + width:.1f}" y="{y + 11}">{rate:.0f}</text>')
        y += 44
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{y}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="760" height="{y}" fill="white"/>', *lines, "</svg>\n"])
