"""Networks and operators on a GPU, against torchvision, timm and torch.compile.

    pytest benchmarks/ --benchmark-only [--benchmark-json FILE] [--gpu-cases REGEX] [--gpu-contenders REGEX]
        [--gpu-seconds N] [--gpu-json FILE]

A row is a contender of a case. The first row of a case times all of its contenders (``gpu_speed.py`` says how), and the
rows report these times. ``.benchmarks/gpu.json``, or the file that is named, is written after each contender, and
``gpu.svg`` beside it at the end. Without a GPU the rows are skipped; under ttsem they run at toy sizes, for the code's
sake.
"""

import functools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton.language", reason="Triton is not installed")

import gpu_cases
from gpu_speed import Row, Speed, chosen
from playback import play_back
from results import Results

from effnet_kernels.backends.triton.launch import simulated

TOY = simulated()
SKIP = None if TOY or torch.cuda.is_available() else "torch finds no GPU"
pytestmark = pytest.mark.skipif(SKIP is not None, reason=f"{SKIP}")
ROUNDS, WARM = (1, 0) if TOY else (20, 5)


@functools.cache
def all_cases(cases: str, contenders: str) -> dict[str, tuple[gpu_cases.Case, list[str]]]:
    return {} if SKIP else {case.name: (case, names) for case, names in chosen(TOY, cases, contenders)}


def chosen_cases(config: pytest.Config) -> dict[str, tuple[gpu_cases.Case, list[str]]]:
    return all_cases(config.getoption("--gpu-cases"), config.getoption("--gpu-contenders"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [(name, contender) for name, (_, names) in chosen_cases(metafunc.config).items() for contender in names]
    metafunc.parametrize(("case", "contender"), rows or [("-", "-")])


@pytest.fixture(scope="session")
def speed(pytestconfig: pytest.Config) -> Iterator[Speed]:
    path = pytestconfig.getoption("--gpu-json")
    path.parent.mkdir(parents=True, exist_ok=True)
    speed = Speed(Results(path, pytestconfig.getoption("--gpu-seconds")), ROUNDS, WARM)
    yield speed
    path.with_suffix(".svg").write_text(picture(speed.results.data["device"], speed.results.data["cases"]))


def test_gpu(benchmark, speed: Speed, case: str, contender: str, pytestconfig: pytest.Config) -> None:
    found, names = chosen_cases(pytestconfig)[case]
    row = speed.measure(found, names)[contender]
    if contender == names[-1]:
        gpu_cases.release()
    if "skipped" in row:
        pytest.skip(row["skipped"])
    if "error" in row:
        # A baseline may be missing something; ours may not.
        (pytest.fail if contender.startswith("ours") else pytest.skip)(f"{contender} does not run here: {row['error']}")
    benchmark.group = case
    play_back(benchmark, row["ms"])
    numbers = {key: value for key, value in row.items() if isinstance(value, float | int)}
    benchmark.extra_info.update({key: round(value, 3) for key, value in numbers.items()})


def picture(device: str, cases: dict[str, dict[str, Row]]) -> str:
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
