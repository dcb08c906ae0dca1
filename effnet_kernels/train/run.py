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
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.train.checkpoints import (
    Checkpoints,
    SafeCheckpointIO,
    checkpoint_damage,
    newest_checkpoint,
    replacing,
)
from effnet_kernels.train.config import Config, read_config
from effnet_kernels.train.data import ImageData, is_shards, preprocess_of
from effnet_kernels.train.module import ImageClassifier, build_network, warmed_average
from effnet_kernels.train.progress import ProgressBar, ProgressLines

CONFIG = "config.toml"
CLASSES = "classes.txt"
CHECKPOINTS = "checkpoints"


# What may change when training goes on: on another machine, or in another place.
_CHANGEABLE = {"data.dir", "data.workers", "training.device", "training.save_minutes", "training.save_steps"}


def train(config: Config, folder: Path, resume: str | None = None) -> float:
    """Trains a network and returns the best validation accuracy.

    Args:
        config: the configuration, of :func:`effnet_kernels.train.recipes.resolve`.
        folder: a new one, for the configuration, the names of the classes, checkpoints, ``logs`` and the events of
            TensorBoard; or that of a run to go on with.
        resume: None for a new run; ``auto`` to go on from the newest good checkpoint in ``folder``, or to begin where
            there is none; or the path of a checkpoint.

    Raises:
        FileExistsError: the folder holds another run.
        OSError, ValueError: the images are not there or do not fit, a checkpoint is damaged or belongs to another
            configuration, or could not be written; or the loss is not finite.
        Interrupted: SIGTERM or SIGINT came; what was done is saved.
    """
    training = config.training
    rank = process_rank()
    # The first process writes the folder while the others begin.
    path = _check_folder(config, folder, resume) if rank == 0 else _checkpoint_of(folder, resume)
    pl.seed_everything(training.seed, workers=True, verbose=False)
    data = ImageData(config)
    module = ImageClassifier(config, len(data.classes), data.batches)
    if rank > 0:
        # Weights are the same, and what is drawn in training is not.
        pl.seed_everything(training.seed + rank, workers=True, verbose=False)
    terminal = sys.stderr is not None and sys.stderr.isatty()
    checkpoints = folder / CHECKPOINTS
    best = ModelCheckpoint(checkpoints, "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
    saving = Checkpoints(checkpoints, training.save_minutes, training.save_steps)
    callbacks: list[Callback] = [LearningRateMonitor("epoch"), ProgressBar(leave=True) if terminal else ProgressLines()]
    if training.ema > 0:
        callbacks.append(WeightAveraging(multi_avg_fn=warmed_average(training.ema)))
    steps_of_log = min(50, data.batches)
    with quiet(), saving.handling_signals():
        trainer = make_trainer(
            training.device,
            config.processes(),
            strategy=_strategy(config, data.processes),
            **trainer_options(config, data),
            log_every_n_steps=steps_of_log,
            enable_progress_bar=terminal,
            logger=[
                CSVLogger(folder, "logs", flush_logs_every_n_steps=steps_of_log),
                TensorBoardLogger(folder, "", ""),
            ],
            # Saving comes last, when averages and the best weights are up to date.
            callbacks=[*callbacks, best, saving],
            plugins=[SafeCheckpointIO()],
        )
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in ((CLASSES, "".join(f"{name}\n" for name in data.classes)), (CONFIG, config.to_toml())):
                with replacing(folder / name) as file:
                    file.write(text.encode())
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return float(best.best_model_score or 0.0)


def _check_folder(config: Config, folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None to begin."""
    if resume is None:
        if (folder / CONFIG).exists():
            raise FileExistsError(
                f"{folder}: expected a folder without a run, got one with {CONFIG}; --resume auto goes on with it"
            )
        return None
    if (folder / CONFIG).exists():
        saved = Config().override(read_config(folder / CONFIG))
        different = [name for name in config.differences(saved) if name not in _CHANGEABLE]
        if different:
            raise ValueError(
                f"{folder}: expected the settings of its run to go on, got others for {', '.join(different)}"
            )
    return _checkpoint_of(folder, resume)


def _checkpoint_of(folder: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return newest_checkpoint(folder / CHECKPOINTS)
    if not Path(resume).is_file():
        raise FileNotFoundError(f"{resume}: there is no such checkpoint")
    if (damage := checkpoint_damage(Path(resume))) is not None:
        raise ValueError(f"{resume}: {damage}")
    return Path(resume)


def _strategy(config: Config, processes: int) -> Any:
    """How several processes share the parameters; raises ValueError for what does not go with parts of them."""
    training = config.training
    if processes == 1:
        return "auto"
    if training.strategy == "fsdp":
        # What Lightning does not have for parts of parameters.
        if training.ema > 0:
            raise ValueError(f"training.ema: expected 0 with training.strategy=fsdp, got {training.ema}")
        if training.precision == "16-mixed":
            raise ValueError(
                "training.precision: expected 32-true or bf16-mixed with training.strategy=fsdp, got 16-mixed"
            )
        # One file with whole tensors, which is written and read as every other checkpoint.
        return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)
    freezes = config.network.freeze_epochs > 0
    # What lets DistributedDataParallel prepare the most does not go with frozen layers.
    return DDPStrategy(
        gradient_as_bucket_view=True,
        find_unused_parameters=freezes,
        static_graph=not freezes and training.accumulate == 1,
    )


def trainer_options(config: Config, data: ImageData) -> dict[str, Any]:
    """What a configuration says of Lightning's trainer; devices, processes, logs and callbacks are the caller's."""
    training = config.training
    return {
        "precision": training.precision,
        "max_epochs": config.schedule.epochs,
        "limit_train_batches": data.batches,
        "accumulate_grad_batches": training.accumulate,
        "gradient_clip_val": training.clip,
        "deterministic": training.deterministic,
        "reload_dataloaders_every_n_epochs": int(config.progressive.stages > 1 or is_shards(config.data.name)),
        "num_sanity_val_steps": 0,
        # The data is shared out by its own samplers.
        "use_distributed_sampler": False,
    }


def make_trainer(device: str, processes: tuple[int, int] = (1, 1), **options: Any) -> pl.Trainer:
    """Lightning's trainer; raises ValueError where there is no such device, or are not so many."""
    devices, nodes = processes
    try:
        return pl.Trainer(accelerator=device, devices=devices, num_nodes=nodes, enable_model_summary=False, **options)
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"training.device: expected a device of this machine, got {device!r}: {error}") from error


def process_rank() -> int:
    """The number of this process among those that train together, of which 0 writes and speaks.

    Lightning reads it from the environment, where it, torchrun or SLURM starts them.
    """
    return getattr(rank_zero_only, "rank", 0)


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
    """The network that a run has trained, with the weights of the highest validation accuracy, or the newest there are.

    Raises OSError where something is missing, ValueError where it is damaged.
    """
    folder = Path(folder)
    config = Config().override(read_config(folder / CONFIG))
    classes = (folder / CLASSES).read_text(encoding="utf-8").splitlines()
    best = folder / CHECKPOINTS / "best.ckpt"
    path = best if best.is_file() else newest_checkpoint(folder / CHECKPOINTS)
    if path is None:
        raise FileNotFoundError(f"{folder / CHECKPOINTS}: expected a checkpoint, got none that is whole")
    try:
        state = SafeCheckpointIO().load_checkpoint(path)["state_dict"]
    except KeyError as error:
        raise ValueError(f"{path}: expected a checkpoint with the key {error}") from error
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
