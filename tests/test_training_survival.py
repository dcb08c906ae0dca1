"""What a run survives: kills at any moment, signals, damaged checkpoints, a full disk, a loss that is no number."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import importing_alike
from training_cases import last_checkpoint, save_colours, save_shards, saved_checkpoints, tiny

from effnet_kernels.tools.cli import main
from effnet_kernels.train import checkpoints
from effnet_kernels.train.checkpoints import SafeCheckpointIO, newest_checkpoint
from effnet_kernels.train.config import Config
from effnet_kernels.train.module import ImageClassifier
from effnet_kernels.train.run import load_run, train

pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("colours"))


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """The places where two checkpoints are not the same, bit for bit."""
    if isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [place]
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{place}: {ours.keys() ^ theirs.keys()}"]
        return [found for key in theirs for found in differences(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(theirs, list | tuple):
        pairs = zip(ours, theirs, strict=True)
        return [found for index, (a, b) in enumerate(pairs) for found in differences(a, b, f"{place}[{index}]")]
    return [] if ours == theirs else [f"{place}: {ours} {theirs}"]


def without_paths(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without the state of the callback that knows the run's folder."""
    callbacks = {name: state for name, state in checkpoint["callbacks"].items() if "ModelCheckpoint" not in name}
    return {**checkpoint, "callbacks": callbacks}


STEADY = {"augmentation": {"mixup": 0.2, "policy": "trivial"}, "data": {"batch_size": 2}, "training": {"save_steps": 1}}
CHANGING = {
    "network": {"freeze_epochs": 1, "dropout": 0.4},
    "data": {"batch_size": 2, "workers": 1},
    "schedule": {"epochs": 3},
    "progressive": {"stages": 3, "image_size": 8, "mixup": 0.1, "dropout": 0.1},
    "training": {"accumulate": 2, "save_steps": 1, "checkpoint": True},
    "optimizer": {"name": "sgd", "momentum": 0.9},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("sections", [STEADY, CHANGING, {**STEADY, "training": {"save_steps": 1, "ema": 0.0}}])
def test_every_checkpoint_leads_to_the_same_end(
    sections: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_every_checkpoint(tiny(folder, **sections), tmp_path, monkeypatch)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_checkpoint_leads_to_the_same_end_with_shards(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"validation": save_shards(tmp_path, 2, 100), "train_images": 6, "classes": ("cat", "dog")}
    data = {"name": save_shards(tmp_path, 3), "workers": workers, **STEADY["data"], **described}
    check_every_checkpoint(tiny(tmp_path, **{**STEADY, "data": data}), tmp_path, monkeypatch)


def check_every_checkpoint(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from any of another's checkpoints ends as that did."""
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_KEPT", 1000)
        train(config, tmp_path / "whole")
    saved = saved_checkpoints(tmp_path / "whole")
    images = config.data.train_images or 8
    steps = images // config.data.batch_size // config.training.accumulate * config.schedule.epochs
    assert [path.name for path in saved] == [f"step-{step:09d}.ckpt" for step in range(1, steps + 1)]
    whole = without_paths(last_checkpoint(tmp_path / "whole"))
    assert Config.model_validate(whole["config"]) == config
    for path in saved[:-1]:
        resumed = tmp_path / path.stem
        train(config, resumed, str(path))
        assert differences(without_paths(last_checkpoint(resumed)), whole) == [], path.name
        shutil.rmtree(resumed)


# Imports take longer than training: a process that has them is forked for each attempt. It has computed nothing, so
# that there are no threads that its children would miss.
ATTEMPTS = """
import os, sys, torch
torch.set_num_threads(1)
import effnet_kernels.train.run, webdataset
from effnet_kernels.tools.cli import main
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = main(line.split())
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_run_that_is_killed_ten_times_ends_as_if_it_was_not(folder: Path, tmp_path: Path) -> None:
    settings = ["augmentation.mixup=0.2", "training.save_steps=1", "data.workers=0", "data.image_size=16"]
    arguments = ["train", "--data", str(folder), "--recipe", "cifar", "--model", "efficientnet_lite0"]
    arguments += ["--epochs", "10", "--batch-size", "2", *(word for value in settings for word in ("--set", value))]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ATTEMPTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **importing_alike(tmp_path),
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def attempt(run: str, seconds: float) -> int:
        """The exit status of training that goes on, or -9 where it was killed after so many seconds."""
        print(*arguments, "--output", tmp_path / run, "--resume", "auto", file=process.stdin, flush=True)
        pid = int(process.stdout.readline())  # type: ignore[union-attr]
        deadline = time.monotonic() + seconds
        # As soon as it has ended, the next line is there, and the process is not.
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
        lines = [process.stdout.readline()]  # type: ignore[union-attr]
        while not lines[-1].strip().lstrip("-").isdigit():
            lines.append(process.stdout.readline())  # type: ignore[union-attr]
        return int(lines[-1])

    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    assert attempt("whole", 300) == 0
    duration = time.monotonic() - begun
    moments = random.Random(0)
    codes: list[int] = []
    while len(codes) < 10 and 0 not in codes:
        codes.append(attempt("killed", moments.uniform(0.02, 0.25) * duration))
    # On a machine that was slower before, it may have ended.
    assert codes.count(-signal.SIGKILL) >= 5, codes
    assert set(codes) <= {0, -signal.SIGKILL}
    assert attempt("killed", 300) == 0
    process.stdin.close()
    process.wait(60)
    ours, theirs = (without_paths(last_checkpoint(tmp_path / name)) for name in ("killed", "whole"))
    assert differences(ours, theirs) == []
    assert load_run(tmp_path / "killed").classes == ["blue", "green", "red"]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


@pytest.mark.parametrize("harm", [damage, flip, remove_checksum])
def test_a_damaged_checkpoint_is_passed_over(
    harm: Callable[[Path], None], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(folder), run)
    expected = without_paths(last_checkpoint(run))
    older, newest = saved_checkpoints(run)
    harm(newest)
    capsys.readouterr()
    assert newest_checkpoint(run / "checkpoints") == older
    assert f"effnet: warning: {newest}: " in capsys.readouterr().err
    assert main(["train", "--output", str(run), "--resume", "auto"]) == 0
    assert f"effnet: warning: {newest}: " in capsys.readouterr().err
    assert differences(without_paths(last_checkpoint(run)), expected) == []
    # One that is asked for by name is refused.
    harm(newest)
    assert main(["train", "--output", str(run), "--resume", str(newest)]) == 2
    assert f"{newest}: " in capsys.readouterr().err
    for path in saved_checkpoints(run):
        damage(path)
    assert newest_checkpoint(run / "checkpoints") is None


def test_a_kill_at_any_file_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    path, replace = tmp_path / "best.ckpt", Path.replace
    found = []
    for survived in range(4):
        monkeypatch.setattr(Path, "replace", replace)
        SafeCheckpointIO().save_checkpoint({"step": 1}, path)
        replaced = []

        def dying(source: Path, target: Path, limit: int = survived, done: list[Path] = replaced) -> Path:
            if len(done) == limit:
                raise Killed
            done.append(target)
            return replace(source, target)

        monkeypatch.setattr(Path, "replace", dying)
        with contextlib.suppress(Killed):
            SafeCheckpointIO().save_checkpoint({"step": 2}, path)
        found.append(SafeCheckpointIO().load_checkpoint(path)["step"])
    assert found == [1, 1, 2, 2]


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    SafeCheckpointIO().save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.ckpt")
    command = ["sha256sum", "--check", "--strict", "a.ckpt.sha256"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == b"a.ckpt: OK\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["training_step", "validation_step"])
def test_signals_finish_the_step_and_save(
    number: int,
    during: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(folder, data={"batch_size": 2})
    train(config, tmp_path / "whole")
    step = getattr(ImageClassifier, during)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    steps = []

    def interrupted(module: ImageClassifier, batch: Any, index: int) -> Any:
        steps.append(index)
        if len(steps) == 2:
            signal.raise_signal(number)
        return step(module, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(ImageClassifier, during, interrupted)
        (tmp_path / "config.toml").write_text(config.to_toml())
        arguments = ["train", "--config", str(tmp_path / "config.toml"), "--output", str(tmp_path / "stopped")]
        assert main(arguments) == (0 if number == signal.SIGTERM else 130)
    assert "stopped and saved" in capsys.readouterr().err
    # No step more than the one that it came in, or than the epoch whose validation it came in.
    assert last_checkpoint(tmp_path / "stopped")["global_step"] == (2 if during == "training_step" else 4)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert main(["train", "--output", str(tmp_path / "stopped"), "--resume", "auto"]) == 0
    ours, theirs = (without_paths(last_checkpoint(tmp_path / name)) for name in ("stopped", "whole"))
    assert differences(ours, theirs) == []


def test_a_full_disk_leaves_what_was_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    config = tiny(folder, training={"save_steps": 1})
    train(config.override({"schedule": {"epochs": 1}}), run)
    saved = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    # Files may not become larger than this, which stands for the end of the disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-\d+.ckpt was not written: File too large"):
            train(config, tmp_path / "other", str(saved_checkpoints(run)[-1]))
        with pytest.raises(OSError, match=r"was not written"):
            SafeCheckpointIO().save_checkpoint({"a": torch.ones(1 << 20)}, saved_checkpoints(run)[-1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == saved
    assert list((tmp_path / "other" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    def write() -> None:
        with checkpoints.replacing(path) as file:
            file.write(b"half of")
            raise error

    path = tmp_path / "last.txt"
    path.write_text("before")
    with pytest.raises(error):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_no_number_names_its_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.clip=none", "optimizer.name=sgd", "optimizer.lr_batch=none", "schedule.warmup_epochs=0"]
    arguments = ["train", "--data", str(folder), "--recipe", "cifar", "--model", "efficientnet_lite0"]
    arguments += ["--batch-size", "4", "--epochs", "5", *(word for value in settings for word in ("--set", value))]
    arguments += ["--set", "data.image_size=16", "--set", "data.workers=0", "--set", "training.save_steps=1"]
    assert main([*arguments, "--set", "optimizer.lr=1e30", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("effnet: error: expected a finite loss, got ")
    assert "at the learning rate " in error
    names = error.split(" for ")[1].split(", ")
    assert len(names) == 4
    assert all(Path(name).is_file() for name in names)
    # The weights of that step are not among what is saved.
    step = int(error.split(" in step ")[1].split()[0])
    assert last_checkpoint(tmp_path / "run")["global_step"] <= step


def test_going_on_with_other_settings_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(folder, schedule={"epochs": 1}), run)
    resumed = ["train", "--output", str(run), "--resume", "auto"]
    assert main([*resumed, "--epochs", "7", "--set", "optimizer.lr=3.0", "--set", "training.save_minutes=3"]) == 2
    assert "got others for optimizer.lr, schedule.epochs" in capsys.readouterr().err
    assert main([*resumed, "--recipe", "paper"]) == 2
    assert "got others for recipe" in capsys.readouterr().err
    # Where and how often do not matter; and there is nothing left to do.
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    assert main([*resumed, "--set", "training.save_minutes=3", "--set", "data.workers=1", "--device", "cpu"]) == 0
    assert "best validation accuracy" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()} == before
    assert main(["train", "--resume", "auto"]) == 2
    assert "--resume: expected --output" in capsys.readouterr().err
    assert main(["train", "--output", str(run), "--resume", str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt: there is no such checkpoint" in capsys.readouterr().err


def test_a_run_that_has_not_begun_begins(folder: Path, tmp_path: Path) -> None:
    train(tiny(folder, schedule={"epochs": 1}), tmp_path / "run", "auto")
    assert last_checkpoint(tmp_path / "run")["global_step"] == 2
