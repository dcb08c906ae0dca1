"""Trains on a Ray cluster: the recipes, data and LightningModule of ``effnet train``, a Ray worker for each process.

    pip install ".[ray]"
    python examples/ray_train.py --workers 2 --epochs 3 --storage /shared/runs --output digits.pth

A worker that is lost is replaced, and training goes on from the last epoch's checkpoint. Ray keeps checkpoints in its
storage: a folder or a bucket that all machines reach.
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray.train.lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from effnet_kernels.train.config import Config, parse_settings
from effnet_kernels.train.data import ImageData
from effnet_kernels.train.module import ImageClassifier, warmed_average
from effnet_kernels.train.recipes import resolve
from effnet_kernels.train.run import quiet, trainer_options

CHECKPOINT = ray.train.lightning.RayTrainReportCallback.CHECKPOINT_NAME


def train_worker(values: dict[str, Any]) -> None:
    """What each worker runs, with the configuration as a dictionary."""
    config = Config.model_validate(values)
    training = config.training
    pl.seed_everything(training.seed, workers=True, verbose=False)
    data = ImageData(config)
    module = ImageClassifier(config, len(data.classes), data.batches)
    # The workers' weights are the same, and what they draw in training is not.
    pl.seed_everything(training.seed + ray.train.get_context().get_world_rank(), workers=True, verbose=False)
    callbacks: list[pl.Callback] = [ray.train.lightning.RayTrainReportCallback()]
    if training.ema > 0:
        callbacks.insert(0, WeightAveraging(multi_avg_fn=warmed_average(training.ema)))
    with quiet():
        trainer = pl.Trainer(
            accelerator=training.device,
            devices="auto",
            strategy=ray.train.lightning.RayDDPStrategy(find_unused_parameters=config.network.freeze_epochs > 0),
            plugins=[ray.train.lightning.RayLightningEnvironment()],
            **trainer_options(config, data),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer = ray.train.lightning.prepare_trainer(trainer)
        saved = ray.train.get_checkpoint()
        with contextlib.nullcontext() if saved is None else saved.as_directory() as folder:
            path = None if folder is None else os.path.join(folder, CHECKPOINT)
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)


def train(config: Config, storage: str, name: str | None = None, failures: int = 3) -> Result:
    """Trains with ``config.training.devices`` workers; the checkpoints with the best validation accuracy are kept."""
    if config.training.strategy != "ddp":
        raise ValueError(f"training.strategy: expected ddp with Ray, got {config.training.strategy}")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config.model_dump(),
        scaling_config=ScalingConfig(num_workers=config.training.devices, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val/accuracy", checkpoint_score_order="max"
            ),
            failure_config=FailureConfig(max_failures=failures),
        ),
    )
    return trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains an EfficientNet on a Ray cluster.")
    parser.add_argument("--data", default="digits", help="as for effnet train; all machines have to reach it")
    parser.add_argument("--recipe", help="as for effnet train")
    parser.add_argument("--model", help="as for effnet train")
    parser.add_argument("--epochs", type=int, help="the recipe's")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers, each with a GPU where there are GPUs; 2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="as for effnet train")
    parser.add_argument("--storage", default="runs", help="a folder or bucket for checkpoints; runs")
    parser.add_argument("--output", type=Path, default=Path("network.pth"), help="for the weights; network.pth")
    arguments = parser.parse_args()
    settings = [f"data.name={arguments.data}", f"training.devices={arguments.workers}", *arguments.set]
    for setting, value in (("network.name", arguments.model), ("schedule.epochs", arguments.epochs)):
        settings += [] if value is None else [f"{setting}={value}"]
    config = resolve(parse_settings(settings), arguments.recipe)

    storage = arguments.storage if "://" in arguments.storage else os.path.abspath(arguments.storage)
    result = train(config, storage)
    best, metrics = max(result.best_checkpoints or [], key=lambda entry: entry[1]["val/accuracy"])
    with best.as_directory() as folder:
        state = torch.load(Path(folder, CHECKPOINT), weights_only=True)["state_dict"]
    prefix = "network."
    torch.save({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}, arguments.output)
    print(f"best validation accuracy {metrics['val/accuracy']:.2%}; the weights are in {arguments.output}")


if __name__ == "__main__":
    main()
