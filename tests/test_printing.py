"""What the command prints, wherever it prints: names are shown and not obeyed, JSON is JSON, errors are a line."""

import contextlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effnet_kernels.backends import select
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.tools import cli
from effnet_kernels.tools.console import printable, to_json
from effnet_kernels.tools.predict import Guess, Prediction

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def control_characters() -> list[str]:
    """All of them below 256, and what else turns text around or ends a line."""
    return [*map(chr, range(32)), *map(chr, range(127, 160)), *"\u200b\u200e\u202e\u2028\u2029\u2066\ufeff", "\x1b[31m"]


NAMES = [f"a{character}b.jpg" for character in control_characters()]
NAMES += [
    "\udcff.jpg",
    "\ud800\udc00.jpg",
    "\udfff\udfff",
    '"\\.jpg',
    "caf\u00e9.jpg",
    "\U0001f408.jpg",
    " ",
    "\\udcff",
]


def strictly(text: str) -> Any:
    """What a reader makes of JSON that has nothing but what JSON has."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    text.encode("ascii")
    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_and_not_obeyed(name: str) -> None:
    prediction = Prediction(name, [Guess("a", 0, 0.5)])
    shown = [printable(name), *cli._as_text(prediction).split("\n"), cli._as_json(prediction)]
    assert len(shown) == 4
    for text in shown:
        assert all(character.isprintable() for character in text), ascii(text)
        text.encode("utf-8")
    read = strictly(cli._as_json(prediction))["photo"]
    if not any(unicodedata.category(character) == "Cs" for character in name):
        assert read == name


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), [float("nan")], {"a": {"b": float("inf")}}]
)
def test_json_has_numbers_alone(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(value)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a network of five classes."""
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    torch.manual_seed(0)
    torch.save(build(VARIANTS["efficientnet_b0"], num_classes=5).state_dict(), path)
    return ["--model", "efficientnet_b0", "--weights", str(path), "--topk", "1"]


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    return str(path)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_folder_of_traps(
    tmp_path: Path, good: str, model: list[str], as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    classified, skipped = [good], []
    for index, name in enumerate(NAMES):
        try:
            path = os.path.join(os.fsencode(tmp_path), os.fsencode(name.replace("/", "")))
            with open(path, "xb") as file:
                Image.new("L", (9, 9)).save(file, "PNG") if index % 2 else file.write(b"no")
        # Some names cannot be had.
        except (OSError, ValueError, UnicodeError):
            continue
        (classified if index % 2 else skipped).append(os.fsdecode(path))
    for name, size in (("long.png", (10_000, 1)), ("longer.png", (60_000, 1)), ("high.png", (1, 60_000))):
        Image.new("1", size).save(tmp_path / name)
        classified.append(str(tmp_path / name))
    assert len(skipped) > 30
    arguments = [*classified, *skipped, *model, *(["--json"] if as_json else [])]
    assert cli.main(["predict", *arguments]) == 1
    shown = capsys.readouterr()
    assert all(character.isprintable() for character in (shown.out + shown.err).replace("\n", ""))
    assert len(shown.err.splitlines()) == len(skipped)
    assert len(shown.out.splitlines()) == len(classified) * (1 if as_json else 2)
    if as_json:
        photos = [strictly(line)["photo"] for line in shown.out.splitlines()]
        assert photos == [name.encode("utf-8", "backslashreplace").decode() for name in classified]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that does nothing."""
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("effnet: error: ")
    assert len(shown.err.splitlines()) == 1
    return shown.err


def test_empty_arguments_are_errors(good: str, model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--weights", ""],
        ["--model", "", "--weights", ""],
        ["--model", "efficientnet_b0", "--weights", ""],
    ):
        assert "expected a name, got ''" in refused(["predict", good, *options], capsys)
    assert "--model: expected a name" in refused(["predict", good, "--model", ""], capsys)
    assert "--device : " in refused(["predict", good, *model, "--device", ""], capsys)
    assert "expected the path of a photograph" in refused(["predict", "", *model], capsys)
    assert "expected the path of a photograph" in refused(["predict", good, "", *model], capsys)
    assert "got ''" in refused(["scale", ""], capsys)


@pytest.mark.parametrize("device", ["meta", "meta:0", "cuda:77", "xla", "nonsense", "cpu:x"])
def test_devices_that_hold_nothing(
    device: str, good: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--device {device}: " in refused(["predict", good, *model, "--device", device], capsys)


@pytest.mark.parametrize("backend", ["triton", "cpu", "abacus"])
def test_a_forced_backend_that_is_missing(
    backend: str, good: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(select.cpu, "unavailable_reason", lambda: "no compiler was found")
    monkeypatch.setattr(select.triton, "unavailable_reason", lambda: "no Triton was found")
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", backend)
    assert backend in refused(["predict", good, *model], capsys)


def closed_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


STREAMS: dict[str, Callable[[], Any]] = {
    "closed by its reader": closed_pipe,
    "closed from the beginning": lambda: None,
    "a full disk": lambda: open("/dev/full", "w"),  # noqa: SIM115
}
COMMANDS = [["predict"], ["predict", "--json"], ["scale"], ["scale", "--json"], ["info"], ["info", "--json"]]
COMMANDS += [["scale", "nonsense"], ["--help"], ["--version"], ["predict", "--help"]]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_streams_that_are_closed(
    stream: str, command: list[str], good: str, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if stream == "a full disk" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    if command[0] == "predict" and "--help" not in command:
        command = [*command, good, *model]
    elif command[0] == "scale" and "nonsense" not in command:
        command = [*command, "efficientnet_b0"]
    for name in ("stdout", "stderr"):
        file, other = STREAMS[stream](), io.StringIO()
        monkeypatch.setattr(sys, name, file)
        monkeypatch.setattr(sys, "stderr" if name == "stdout" else "stdout", other)
        try:
            status = cli.main(command)
        except SystemExit as exit:
            status = exit.code
        assert status in (0, 1, 2)
        assert "Traceback" not in other.getvalue()
        if file is not None:
            # Nothing is left in stdout that could fail at exit; of stderr Python ignores it.
            with contextlib.suppress(*([] if name == "stdout" else [OSError])):
                file.close()
