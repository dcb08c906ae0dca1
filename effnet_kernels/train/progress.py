"""How training goes: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from effnet_kernels.tools.console import say
from effnet_kernels.train.data import Batch

# Metrics of the LightningModule, in the words and the order that they are shown in.
_SHOWN = {
    "train/loss": ("loss", "{:.3f}"),
    "train/accuracy": ("accuracy", "{:.1%}"),
    "val/accuracy": ("val accuracy", "{:.1%}"),
}


class Pace:
    """Images a second of the epoch so far, and the time until the end of training."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.begun, self.share_before = time.monotonic(), _share(trainer)
        self.restart()

    def restart(self) -> None:
        """Begins an epoch."""
        self.epoch_begun, self.images, self.seconds = time.monotonic(), 0, 0.0

    def count(self, batch: Batch) -> None:
        """Adds a batch that has been trained with."""
        self.images += len(batch.images)
        self.seconds = time.monotonic() - self.epoch_begun

    def metrics(self, trainer: pl.Trainer) -> dict[str, str]:
        """What is shown, as text by name."""
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = {label: form.format(known[name]) for name, (label, form) in _SHOWN.items() if name in known}
        shown["images/s"] = f"{self.images / max(self.seconds, 1e-9):.0f}"
        share = _share(trainer)
        if share > self.share_before:
            left = (time.monotonic() - self.begun) * (1 - share) / (share - self.share_before)
            shown["left"] = str(timedelta(seconds=round(left)))
        return shown


def _share(trainer: pl.Trainer) -> float:
    """The part of training that is done."""
    return trainer.global_step / trainer.estimated_stepping_batches


class ProgressBar(TQDMProgressBar):
    """Lightning's bar of an epoch, with the pace and the time until the end of training."""

    def on_train_start(self, *arguments: Any) -> None:
        super().on_train_start(*arguments)
        self.pace = Pace(arguments[0])

    def on_train_epoch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")
        self.pace.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.pace.count(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        return self.pace.metrics(trainer)


class ProgressLines(Callback):
    """A line on stderr for each epoch, and one a minute in long ones."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace = Pace(trainer)
        self.said = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.pace.count(batch)
        if time.monotonic() - self.said > 60:
            self._say(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        self.said = time.monotonic()
        shown = "  ".join(f"{label} {value}" for label, value in self.pace.metrics(trainer).items())
        if trainer.is_global_zero:
            say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}", sys.stderr)
