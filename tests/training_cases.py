"""Small runs for the tests of training."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effnet_kernels.train.config import Config
from effnet_kernels.train.recipes import resolve


def save_colours(root: Path) -> Path:
    """Twelve images of three classes of plain colours."""
    colours = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (210, 50, 40)}
    for number, (name, colour) in enumerate(colours.items()):
        (root / name).mkdir()
        for index in range(4):
            noise = np.random.default_rng(4 * number + index).integers(-30, 31, (16, 16, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def photograph(seed: int, size: int = 24) -> Any:
    """An RGB image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def save_shards(
    path: Path, number: int, first: int = 0, change: Callable[[dict[str, bytes]], None] = lambda _: None
) -> str:
    """Shards of four samples, in WebDataset's layout; the pattern that names all."""
    for shard in range(number):
        with tarfile.open(path / f"{first}-{shard}.tar", "w") as archive:
            for sample in range(4):
                file = io.BytesIO()
                photograph(first + 4 * shard + sample).save(file, "PNG")
                entry = {"png": file.getvalue(), "cls": str(sample % 2).encode()}
                change(entry)
                for suffix, content in entry.items():
                    info = tarfile.TarInfo(f"{shard}{sample}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return str(path / (f"{first}-{{0..{number - 1}}}.tar"))


def tiny(folder: Path, **sections: dict[str, Any]) -> Config:
    """Two steps an epoch of the smallest network, on images of 16 pixels."""
    values: dict[str, dict[str, Any]] = {
        "network": {"name": "efficientnet_lite0"},
        "data": {"name": str(folder), "image_size": 16, "batch_size": 4, "workers": 0, "held_out": 0.25},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
    }
    for section, entries in sections.items():
        values[section] = {**values.get(section, {}), **entries}
    return resolve(values, "cifar")


def saved_checkpoints(run: Path) -> list[Path]:
    """What a run can go on from, the newest last."""
    return sorted(run.glob("checkpoints/step-*.ckpt"))


def last_checkpoint(run: Path) -> dict[str, Any]:
    """The content of a run's newest checkpoint."""
    return torch.load(saved_checkpoints(run)[-1], weights_only=True)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights and statistics of a run's newest checkpoint."""
    return last_checkpoint(run)["state_dict"]
