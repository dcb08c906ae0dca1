"""The examples for Ray, each on a Ray of its own with two workers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import importing_alike
from skimage import data as photographs
from training_cases import save_colours

from effnet_kernels import efficientnet_lite0
from effnet_kernels.tools.cli import main

pytest.importorskip("ray", reason="the extra ray is not installed")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """For Ray's own files; the paths of its sockets have to be short."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield folder


def run(script: Path, arguments: list[str], folder: Path, ray_folder: str) -> subprocess.CompletedProcess[str]:
    options = importing_alike(folder, RAY_TMPDIR=ray_folder, RAY_USAGE_STATS_ENABLED="0")
    options["env"].pop("RAY_ADDRESS", None)
    options["env"]["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_lost_worker_is_replaced_and_training_goes_on(tmp_path: Path, ray_folder: str) -> None:
    (tmp_path / "colours").mkdir()
    colours = save_colours(tmp_path / "colours")
    # The second worker dies in the second epoch, once Ray knows of the first one's checkpoint.
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal, sys, time; from pathlib import Path; import ray_train\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "def dying(values):\n"
        "    from effnet_kernels.train.module import ImageClassifier; from ray_train import train_worker\n"
        "    step, lost = ImageClassifier.training_step, folder / 'lost'\n"
        "    def dying_step(module, batch, index):\n"
        "        if module.current_epoch == 1 and module.global_rank == 1 and not lost.exists():\n"
        "            while not list(folder.glob('runs/*/checkpoint_manager_snapshot.json')): time.sleep(0.1)\n"
        "            lost.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        with (folder / f'epochs{module.global_rank}').open('a') as file:\n"
        "            file.write(f'{module.current_epoch} ')\n"
        "        return step(module, batch, index)\n"
        "    ImageClassifier.training_step = dying_step\n"
        "    train_worker(values)\n"
        "ray_train.train_worker = dying\n"
        "ray_train.main()\n"
    )
    output = tmp_path / "network.pth"
    settings = ["data.image_size=16", "data.workers=0", "data.held_out=0.25", "data.batch_size=2"]
    arguments = ["--data", str(colours), "--recipe", "cifar", "--model", "efficientnet_lite0", "--epochs", "3"]
    arguments += [word for value in settings for word in ("--set", value)]
    arguments += ["--storage", str(tmp_path / "runs"), "--output", str(output)]
    done = run(script, arguments, tmp_path, ray_folder)
    assert "best validation accuracy" in done.stdout
    # The first worker may have begun a step of the second epoch that nobody finished.
    epochs = ["0", "0", "1", "1", "2", "2"]
    assert (tmp_path / "epochs1").read_text().split() == epochs
    assert (tmp_path / "epochs0").read_text().split() in (epochs, sorted([*epochs, "1"]))
    network = efficientnet_lite0(num_classes=3)
    network.load_state_dict(torch.load(output, weights_only=True))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_photographs_are_classified_as_effnet_predict_does(
    tmp_path: Path, ray_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea", "coffee", "rocket", "camera"):
        Image.fromarray(getattr(photographs, name)()).save(photos / f"{name}.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (photos / "notes.txt").write_text("not a photograph")
    done = run(EXAMPLES / "ray_predict.py", [str(photos), "--workers", "2", "--batch-size", "2"], tmp_path, ray_folder)
    found = {Path(row["photo"]).name: row for row in map(json.loads, done.stdout.splitlines())}

    assert main(["predict", str(photos), "--json"]) == 1
    shown = capsys.readouterr()
    expected = {Path(row["photo"]).name: row["predictions"][0] for row in map(json.loads, shown.out.splitlines())}
    assert found.pop("broken.jpg")["error"].endswith(shown.err.strip().rpartition("broken.jpg")[2])
    assert found.keys() == expected.keys()
    for name, guess in expected.items():
        assert found[name]["class"] == guess["class"]
        assert found[name]["probability"] == pytest.approx(guess["probability"], abs=1e-4)
