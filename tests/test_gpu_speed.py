"""The driver of the GPU's benchmarks without a GPU: what a failure, a spent budget or an interruption leaves."""

import json
from pathlib import Path

import pytest
import torch

from effnet_kernels.backends import triton

if triton.unavailable_reason() is not None:
    pytest.skip(f"{triton.unavailable_reason()}", allow_module_level=True)
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import gpu_cases
import gpu_speed
from results import Results


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(gpu_speed.timing, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(gpu_speed, "_peak", lambda call: 0.0)
    monkeypatch.setattr(gpu_speed, "_kernels", lambda call, rounds: {})
    monkeypatch.setattr(gpu_cases, "release", lambda: None)


def works() -> None: ...


def fails() -> None:
    raise RuntimeError("Failed to find C compiler")


def case(name: str = "a case", **contenders) -> gpu_cases.Case:
    """Of contenders that are built by calling functions, and are called by calling what these return."""
    return gpu_cases.Case(name, 2, list(contenders), lambda: contenders)


def speed(path: Path | None = None, seconds: float | None = None) -> gpu_speed.Speed:
    return gpu_speed.Speed(Results(path, seconds), rounds=2, warm=0)


def test_ours_is_timed_beside_each_contender() -> None:
    rows = speed().measure(case(ours=lambda: works, eager=lambda: works), ["ours", "eager"])
    assert "ratio" not in rows["ours"]
    assert len(rows["eager"]["ms"]) == len(rows["eager"]["ours ms"]) == 2
    assert rows["eager"]["ratio"] > 0


@pytest.mark.parametrize("failing", [fails, lambda: fails])
def test_a_contender_that_fails_costs_itself_alone(failing) -> None:
    """Where it is built, as where torch.compile has no compiler, or where it is called."""
    rows = speed().measure(
        case(ours=lambda: works, compiled=failing, eager=lambda: works), ["ours", "compiled", "eager"]
    )
    assert rows["compiled"] == {"error": "RuntimeError: Failed to find C compiler"}
    assert len(rows["ours"]["ms"]) == len(rows["eager"]["ms"]) == 2


@pytest.mark.parametrize("failing", [fails, lambda: fails])
def test_without_ours_the_others_are_timed_alone(failing) -> None:
    rows = speed().measure(case(ours=failing, eager=lambda: works), ["ours", "eager"])
    assert "error" in rows["ours"]
    assert "ratio" not in rows["eager"]
    assert len(rows["eager"]["ms"]) == 2


def test_a_case_that_cannot_be_built_is_an_error_of_all_its_rows() -> None:
    broken = gpu_cases.Case("broken", 1, ["ours", "eager"], fails)
    rows = speed().measure(broken, broken.names)
    assert ["error" in rows[name] for name in broken.names] == [True, True]


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speed(path).measure(case(ours=lambda: works, eager=lambda: interrupted), ["ours", "eager"])
    written = json.loads(path.read_text())
    assert list(written["cases"]["a case"]) == ["ours"]
    assert written["copy GB/s"] == 1.0


def test_nothing_is_begun_when_the_time_is_spent() -> None:
    rows = speed(seconds=-1.0).measure(case(ours=lambda: works, eager=fails), ["ours", "eager"])
    assert rows == {"ours": {"skipped": "no time was left"}, "eager": {"skipped": "no time was left"}}


def test_a_compilation_needs_time() -> None:
    slow = "torch.compile default"
    rows = speed(seconds=30.0).measure(case(**{"ours": lambda: works, slow: lambda: works}), ["ours", slow])
    assert "ms" in rows["ours"]
    assert rows[slow] == {"skipped": "no time was left"}


def test_what_was_measured_is_not_measured_again() -> None:
    measured, found = speed(), case(ours=lambda: works, eager=lambda: works)
    first = dict(measured.measure(found, ["ours"]))
    assert measured.measure(found, ["ours", "eager"])["ours"] is first["ours"]


def test_cases_and_contenders_are_chosen_by_patterns() -> None:
    found = gpu_speed.chosen(False, "^efficientnet_b0 .* float16 ", "^torchvision")
    assert len(found) == 6
    for one, names in found:
        assert " float16 " in one.name
        assert names[0] == "ours"
        assert {name.split()[0].rstrip(",") for name in names[1:]} == {"torchvision"}
