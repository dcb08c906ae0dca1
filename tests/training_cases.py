"""Small runs for the tests of training."""

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
