"""The comparison of engines: what it runs, reports and refuses. Nothing here looks at a time."""

import importlib.util
import json
import math

import pytest
from native_cases import kernel_isas, needs_native

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.tools import bench
from effnet_kernels.tools.cli import main

pytestmark = needs_native

CHANNELS_LAST = "torchvision channels-last"
QUICK = ["bench", "--resolution", "32", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _peers() -> None:
    pytest.importorskip("torchvision", reason="compares with torchvision, the extra 'third-party'")


def test_rows(monkeypatch):
    monkeypatch.setitem(bench.BASELINES, "openvino", "no_such_module")
    engines = [bench.OURS, CHANNELS_LAST, "openvino"]
    comparison = bench.compare("efficientnet_b0", 2, 32, 1, engines, rounds=1)
    ours, third_party, absent = comparison.rows
    assert [row.engine for row in comparison.rows] == engines
    assert ours.ratio == 1
    assert third_party.ratio == third_party.milliseconds / ours.milliseconds
    assert 0 <= ours.error <= bench.TOLERANCE
    assert absent == bench.Row("openvino", missing="skipped: no_such_module is not installed")
    table = str(comparison).splitlines()
    assert table[0] == "efficientnet_b0 at 32, batch 2, 1 threads, float32"
    assert [line.split()[0] for line in table[2:]] == [bench.OURS, "torchvision", "openvino"]


def test_workers_import_the_package_that_runs(monkeypatch, tmp_path):
    (tmp_path / "effnet_kernels.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    (row,) = bench.compare("efficientnet_b0", 1, 32, 1, [bench.OURS], rounds=1).rows
    assert row.error <= bench.TOLERANCE


def test_timm_where_torchvision_has_no_such_network():
    pytest.importorskip("timm", reason="compares with timm, the extra 'third-party'")
    assert bench.engines_of("efficientnet_lite0")[1:3] == ("timm accelerated", "timm channels-last")
    (row,) = bench.compare("efficientnet_lite0", 1, 64, 1, [bench.OURS], rounds=1).rows
    assert row.error <= bench.TOLERANCE


def test_a_training_step_has_the_same_losses():
    engines = [bench.OURS, "torchvision accelerated", CHANNELS_LAST]
    comparison = bench.compare("efficientnet_b0", 4, 64, 1, engines, rounds=1, training=True)
    assert [row.engine for row in comparison.rows] == engines
    assert all(row.milliseconds > 0 and row.error <= bench.TOLERANCE for row in comparison.rows)
    assert str(comparison).startswith("efficientnet_b0 at 64, batch 4, 1 threads, float32, training step\n")
    assert "onnxruntime" not in bench.engines_of("efficientnet_b0", training=True)


def test_no_speed_where_outputs_disagree(monkeypatch, capsys):
    # Nothing is as close as this.
    monkeypatch.setattr(bench, "TOLERANCE", -1.0)
    assert main([*QUICK, "--engines", bench.OURS]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "effnet_kernels: expected outputs within" in said.err
    assert "no speed is printed" in said.err


def test_command_prints_json_and_draws(capsys, tmp_path):
    picture = []
    if importlib.util.find_spec("matplotlib"):
        picture = ["--plot", str(tmp_path / "speed.png")]
    assert main([*QUICK, "--engines", f"{bench.OURS},{CHANNELS_LAST}", "--json", *picture]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["resolution"], facts["threads"]) == ("efficientnet_b0", 32, 1)
    assert [row["engine"] for row in facts["rows"]] == [bench.OURS, CHANNELS_LAST]
    assert not picture or (tmp_path / "speed.png").stat().st_size > 1000


def test_unknown_engine(capsys):
    assert main([*QUICK, "--engines", "tensorflow"]) == 2
    assert "expected some of effnet_kernels, torchvision accelerated, torch" in capsys.readouterr().err


def test_every_isa_has_a_peak():
    for isa in kernel_isas():
        peak = extension().fma_peak(1, isa=isa)
        assert math.isfinite(peak)
        assert peak > 1e8
