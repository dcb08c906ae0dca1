"""scripts/gpu_day.sh: that a step which fails is told and does not stop the next. CI runs its stages without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_day.sh"
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout", "realpath"))), reason="needs bash and GNU's tools"
)


def run(tmp_path: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": "false"}
    return subprocess.run(["bash", SCRIPT, *stages], env=environment, capture_output=True, text=True, timeout=60)


def test_every_step_is_tried_and_every_failure_told(tmp_path: Path) -> None:
    result = run(tmp_path, "2", "4")
    assert result.returncode == 1
    failed = [line.removeprefix("FAILED: ") for line in result.stdout.splitlines() if line.startswith("FAILED: ")]
    assert failed == ["speed in float16", "speed in bfloat16", "before", "tuner", "after"]
    assert "== tuner: status 1 after" in (tmp_path / "out" / "stage_4.txt").read_text()


def test_an_unknown_stage_is_an_error(tmp_path: Path) -> None:
    result = run(tmp_path, "6")
    assert result.returncode == 2
    assert "expected stages out of 1 to 5 or dry, got 6" in result.stderr
