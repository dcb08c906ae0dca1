"""The comparison of engines: what it runs, reports and refuses. Nothing here looks at a time."""

import importlib.util
import json
import math

import pytest
from native_cases import kernel_isas, needs_native

from effnet_kernels.backends import cpu
from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.tools import bench
from effnet_kernels.tools.cli import main

pytestmark = needs_native

CHANNELS_LAST = "torchvision channels-last"
TOLERANCE = bench.TOLERANCES["float32"]
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
    assert 0 <= ours.error <= TOLERANCE
    assert (ours.dtype, third_party.dtype) == ("float32", "float32")
    assert absent == bench.Row("openvino", missing="skipped: no_such_module is not installed")
    table = str(comparison).splitlines()
    assert table[0] == "efficientnet_b0 at 32, batch 2, 1 threads"
    assert [line.split()[0] for line in table[2:]] == [bench.OURS, "torchvision", "openvino"]


def test_workers_import_the_package_that_runs(monkeypatch, tmp_path):
    (tmp_path / "effnet_kernels.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    (row,) = bench.compare("efficientnet_b0", 1, 32, 1, [bench.OURS], rounds=1).rows
    assert row.error <= TOLERANCE


def test_timm_where_torchvision_has_no_such_network():
    pytest.importorskip("timm", reason="compares with timm, the extra 'third-party'")
    assert bench.engines_of("efficientnet_lite0")[2:4] == ("timm accelerated", "timm channels-last")
    (row,) = bench.compare("efficientnet_lite0", 1, 64, 1, [bench.OURS], rounds=1).rows
    assert row.error <= TOLERANCE


def test_a_training_step_has_the_same_losses():
    engines = [bench.OURS, "torchvision accelerated", CHANNELS_LAST]
    comparison = bench.compare("efficientnet_b0", 4, 64, 1, engines, rounds=1, training=True)
    assert [row.engine for row in comparison.rows] == engines
    assert all(row.milliseconds > 0 and row.error <= TOLERANCE for row in comparison.rows)
    assert str(comparison).startswith("efficientnet_b0 at 64, batch 4, 1 threads, training step\n")
    assert "onnxruntime" not in bench.engines_of("efficientnet_b0", training=True)


def test_no_speed_where_outputs_disagree(monkeypatch, capsys):
    # Nothing is as close as this.
    monkeypatch.setitem(bench.TOLERANCES, "float32", -1.0)
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
    assert "expected some of effnet_kernels, effnet_kernels bfloat16, torchvision acc" in capsys.readouterr().err


@pytest.mark.skipif(not cpu.runs_bf16(), reason="this processor has no AVX512-BF16")
def test_ratios_of_the_engine_in_bfloat16():
    engines = [bench.OURS, bench.OURS_BF16]
    float32, bfloat16 = bench.compare("efficientnet_b0", 1, 64, 1, engines, rounds=1, dtype="bfloat16").rows
    assert (float32.dtype, bfloat16.dtype) == ("float32", "bfloat16")
    assert bfloat16.ratio == 1
    assert float32.ratio == float32.milliseconds / bfloat16.milliseconds
    assert 1e-4 < bfloat16.error <= bench.TOLERANCES["bfloat16"]


def test_bfloat16_without_the_instruction():
    with cpu.use_isa("scalar"):
        (row,) = bench.compare("efficientnet_b0", 1, 32, 1, [bench.OURS_BF16], rounds=1).rows
        with pytest.raises(ValueError, match=r"expected an instruction set that multiplies in bfloat16"):
            bench.compare("efficientnet_b0", dtype="bfloat16")
    assert row.missing is not None
    assert row.missing.endswith("does not multiply in bfloat16")
    with pytest.raises(ValueError, match=r"dtype: expected float32, got 'bfloat16'"):
        bench.compare("efficientnet_b0", training=True, dtype="bfloat16")
    assert main([*QUICK, "--training", "--dtype", "bfloat16"]) == 2


def test_openvino_as_it_comes_names_its_precision():
    pytest.importorskip("openvino", reason="compares with OpenVINO, the extra 'bench'")
    engines = [bench.OURS, "openvino", "openvino default"]
    _, told, chosen = bench.compare("efficientnet_b0", 1, 64, 1, engines, rounds=1).rows
    assert told.dtype == "float32"
    assert chosen.dtype in bench.TOLERANCES


def test_every_isa_has_a_peak():
    for isa in kernel_isas():
        peak = extension().fma_peak(1, isa=isa)
        assert math.isfinite(peak)
        assert peak > 1e8
