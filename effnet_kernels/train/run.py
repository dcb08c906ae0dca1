"""A run: its folder, its Lightning trainer, and the network that comes out."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.train.config import Config, read_config
from effnet_kernels.train.data import ImageData, preprocess_of
from effnet_kernels.train.module import ImageClassifier, build_network, warmed_average
from effnet_kernels.train.progress import ProgressBar, ProgressLines

CONFIG = "config.toml"
CLASSES = "classes.txt"
CHECKPOINTS = "checkpoints"


def train(config: Config, folder: Path) -> float:
    """Trains a network and returns the validation accuracy of the last epoch.

    Args:
        config: the configuration, of :func:`effnet_kernels.train.recipes.resolve`.
        folder: a new one, for the configuration, the names of the classes, checkpoints, ``metrics.csv`` and the events
            of TensorBoard.

    Raises:
        FileExistsError: the folder holds another run.
        OSError, ValueError: the images are not there, or do not fit.
    """
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder}: expected a folder without a run, got one with {CONFIG}")
    training = config.training
    pl.seed_everything(training.seed, workers=True, verbose=False)
    data = ImageData(config)
    module = ImageClassifier(config, len(data.classes), data.batches)
    terminal = sys.stderr is not None and sys.stderr.isatty()
    callbacks: list[Callback] = [
        ModelCheckpoint(folder / CHECKPOINTS, "best", monitor="val/accuracy", mode="max"),
        ModelCheckpoint(folder / CHECKPOINTS, "last"),
        LearningRateMonitor("epoch"),
        ProgressBar(leave=True) if terminal else ProgressLines(),
    ]
    if training.ema > 0:
        callbacks.append(WeightAveraging(multi_avg_fn=warmed_average(training.ema)))
    with quiet():
        trainer = make_trainer(
            training.device,
            precision=training.precision,
            max_epochs=config.schedule.epochs,
            limit_train_batches=data.batches,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            deterministic=training.deterministic,
            reload_dataloaders_every_n_epochs=1 if config.progressive.stages > 1 else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=min(50, data.batches),
            enable_progress_bar=terminal,
            logger=[CSVLogger(folder, "", ""), TensorBoardLogger(folder, "", "")],
            callbacks=callbacks,
        )
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / CONFIG)
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in data.classes), encoding="utf-8")
        trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["val/accuracy"])


def make_trainer(device: str, **options: Any) -> pl.Trainer:
    """Lightning's trainer on one device; raises ValueError where there is no such device."""
    try:
        return pl.Trainer(accelerator=device, devices=1, enable_model_summary=False, **options)
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"training.device: expected a device of this machine, got {device!r}: {error}") from error


class TrainedRun(NamedTuple):
    """What a run's folder holds: the network with its best weights, in eval mode, and how it is used."""

    network: EfficientNet
    config: Config
    classes: list[str]
    preprocess: ImagePreprocess


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run's folder."""
    return Path(path, CONFIG).is_file()


def load_run(folder: str | os.PathLike[str]) -> TrainedRun:
    """The network that a run has trained, with the weights of the highest validation accuracy.

    Raises OSError where something is missing, ValueError where it is damaged.
    """
    folder = Path(folder)
    config = Config().override(read_config(folder / CONFIG))
    classes = (folder / CLASSES).read_text(encoding="utf-8").splitlines()
    path = folder / CHECKPOINTS / "best.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; has the run finished an epoch?")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:
        raise ValueError(f"{path}: expected a checkpoint of Lightning, got: {error}") from error
    # The weights that training began with are not needed, and may be gone.
    begun = config.override({"network": {"weights": None}})
    network = build_network(begun, len(classes))
    prefix = "network."
    network.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    return TrainedRun(network.eval(), config, classes, preprocess_of(config.data))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's advice to programmers from the terminal."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            logger.setLevel(level)
