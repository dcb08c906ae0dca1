"""How good a trained network is: top-1, top-5, by class, and what it confuses."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.train.data import Batch, ImageData
from effnet_kernels.train.run import TrainedRun, make_trainer, quiet

# More classes than this make an unreadable picture with numbers in it.
_NUMBERED = 20


@dataclass(frozen=True)
class Evaluation:
    """The counts of a validation set.

    Attributes:
        classes: their names.
        confusion: [true class, predicted class], numbers of images.
        top1, top5: the parts of the images whose class is the network's first guess, or among its first five.
    """

    classes: list[str]
    confusion: Tensor
    top1: float
    top5: float

    def by_class(self) -> list[tuple[str, int, float, float]]:
        """Each class with its images, recall and precision; NaN where there is nothing to divide by."""
        right = self.confusion.diagonal().float()
        images, named = self.confusion.sum(1), self.confusion.sum(0)
        columns = (images.tolist(), (right / images).tolist(), (right / named).tolist())
        return list(zip(self.classes, *columns, strict=True))

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; None in place of NaN."""
        rows = [
            {"class": name, "images": images, "recall": _number(recall), "precision": _number(precision)}
            for name, images, recall, precision in self.by_class()
        ]
        return {"top1": self.top1, "top5": self.top5, "classes": rows, "confusion": self.confusion.tolist()}

    def __str__(self) -> str:
        width = max(len("class"), *map(len, self.classes))
        lines = [f"{'class':<{width}}{'images':>9}{'recall':>10}{'precision':>11}"]
        lines += [
            f"{name:<{width}}{images:>9,}{recall:>10.2%}{precision:>11.2%}"
            for name, images, recall, precision in self.by_class()
        ]
        images = int(self.confusion.sum())
        return "\n".join([*lines, f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {images:,} images"])

    def plot(self, path: Path) -> None:
        """Draws the confusion matrix."""
        from matplotlib.figure import Figure

        size = min(6 + 0.2 * len(self.classes), 30)
        figure = Figure((size, size), layout="constrained")
        MulticlassConfusionMatrix(len(self.classes)).plot(
            self.confusion, ax=figure.add_subplot(), add_text=len(self.classes) <= _NUMBERED, labels=self.classes
        )
        figure.savefig(path, dpi=150)


class _Evaluator(pl.LightningModule):
    def __init__(self, network: EfficientNet, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.network(batch.images).float()
        self.confusion.update(logits.argmax(1), batch.labels)
        self.top5.update(logits, batch.labels)


def evaluate(run: TrainedRun, device: str = "auto") -> Evaluation:
    """Counts what a run's network says of the images to validate with.

    Raises OSError and ValueError where the images are not there or have other classes.
    """
    data = ImageData(run.config)
    if data.classes != run.classes:
        raise ValueError(f"{run.config.data.name}: expected the classes {run.classes}, got {data.classes}")
    evaluator = _Evaluator(run.network, len(run.classes))
    with quiet():
        make_trainer(device, logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(
            evaluator, data, verbose=False
        )
    confusion, images = evaluator.confusion.confmat.cpu(), int(evaluator.confusion.confmat.sum())
    return Evaluation(run.classes, confusion, int(confusion.trace()) / images, float(evaluator.top5.compute()))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
