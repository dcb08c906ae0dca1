"""The network, its loss, its optimizer and its schedule, as Lightning has them."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.factory import create_model
from effnet_kernels.models.variants import find_variant
from effnet_kernels.train.config import Config
from effnet_kernels.train.data import Batch


class ImageClassifier(pl.LightningModule):
    """An EfficientNet that is trained as a configuration says.

    Args:
        config: the configuration.
        num_classes: outputs of the classifier.
        batches: of an epoch, in each process.
    """

    def __init__(self, config: Config, num_classes: int, batches: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.batches = batches
        self.network = build_network(config, num_classes)
        if config.training.sync_batch_norm:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        if config.training.checkpoint:
            for layer in list(self.network.features)[1:-1]:
                recompute(layer)
        if config.training.compile:
            self.network.compile()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")
        self.mix: Any = None
        self.random: list[dict[str, Any]] | None = None

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def configure_model(self) -> None:
        """Gives each process its part of the parameters, where the strategy is to share them."""
        if self.device_mesh is None:
            return
        # There are builds of torch without it.
        from torch.distributed.fsdp import fully_shard

        for part in (*self.network.features, self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Goes on in the middle of an epoch, with the random numbers that would have come."""
        self._begin_epoch()
        if self.random is not None:
            set_random_state(self.random[self.global_rank])

    def on_train_epoch_start(self) -> None:
        self._begin_epoch()

    def on_validation_epoch_start(self) -> None:
        """Gives all processes the first one's running statistics, which are saved, as DistributedDataParallel does."""
        if self.device_mesh is not None:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration, and the states of torch's random generators in every process."""
        checkpoint["config"] = self.config.model_dump()
        states: list[Any] = [random_state()]
        if self.trainer.world_size > 1:
            states *= self.trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is of another number of processes."""
        self.random = checkpoint["random"]
        if len(self.random) != self.trainer.world_size:
            raise ValueError(
                f"expected {len(self.random)} processes, as many as saved the checkpoint, got {self.trainer.world_size}"
            )

    def _begin_epoch(self) -> None:
        """Sets what changes from epoch to epoch: dropout, mixup, and whether the backbone is trained."""
        config = self.config.at_epoch(self.current_epoch)
        if config.network.dropout is not None:
            self.network.classifier[0].p = config.network.dropout  # type: ignore[assignment]
        mixers: list[Any] = []
        if config.augmentation.mixup > 0:
            mixers.append(v2.MixUp(alpha=config.augmentation.mixup, num_classes=self.num_classes))
        if config.augmentation.cutmix > 0:
            mixers.append(v2.CutMix(alpha=config.augmentation.cutmix, num_classes=self.num_classes))
        self.mix = v2.RandomChoice(mixers) if mixers else None
        frozen = self.current_epoch < config.network.freeze_epochs
        self.network.features.requires_grad_(not frozen)
        # The running statistics of frozen layers stay, too.
        self.network.features.train(not frozen)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        images, labels = batch.images, batch.labels
        # BatchNorm needs two values of a channel.
        if len(images) < 2:
            if self.trainer.world_size > 1:
                raise ValueError(f"expected two images that can be read in each process's batch, got {batch.names}")
            return None
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        logits = self.network(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.augmentation.label_smoothing)
        if not loss.isfinite():
            rate = self.trainer.optimizers[0].param_groups[-1]["lr"]
            raise ValueError(
                f"expected a finite loss, got {float(loss)} in step {self.global_step} of epoch "
                f"{self.current_epoch + 1}, at the learning rate {rate:.3g}, for {', '.join(batch.names)}"
            )
        with torch.no_grad():
            accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("train/loss", loss, prog_bar=True, on_epoch=True, batch_size=len(images))
        self.log("train/accuracy", accuracy, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.network(batch.images).float()
        self.top1.update(logits, batch.labels)
        self.top5.update(logits, batch.labels)
        loss = F.cross_entropy(logits, batch.labels)
        self.log("val/loss", loss, on_epoch=True, batch_size=len(batch.images), sync_dist=True)
        self.log("val/accuracy", self.top1, prog_bar=True, on_epoch=True, batch_size=len(batch.images))
        self.log("val/top5", self.top5, on_epoch=True, batch_size=len(batch.images))

    def configure_optimizers(self) -> Any:
        """timm's optimizer over four groups, and a factor of the rate for each step."""
        settings, schedule = self.config.optimizer, self.config.schedule
        images = self.config.data.batch_size * self.config.training.accumulate * self.trainer.world_size
        rate = settings.lr * (images / settings.lr_batch if settings.lr_batch is not None else 1.0)
        groups = []
        for part, ratio in ((self.network.features, settings.backbone_lr_ratio), (self.network.classifier, 1.0)):
            for group in param_groups_weight_decay(part, settings.weight_decay):
                groups.append({**group, "lr": rate * ratio})
        options: dict[str, Any] = {**settings.options}
        if settings.momentum is not None:
            options["momentum"] = settings.momentum
        optimizer = create_optimizer_v2(groups, settings.name, lr=rate, **options)
        steps = self.batches / self.config.training.accumulate
        scheduler = LambdaLR(optimizer, lambda step: schedule.factor((step + 0.5) / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def random_state() -> dict[str, Any]:
    """The states of torch's generators, which draw dropout, stochastic depth and mixup."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the states of :func:`random_state`; those of GPUs that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)


def build_network(config: Config, num_classes: int) -> EfficientNet:
    """The network of a configuration, with its initial or its trained weights."""
    network = config.network
    options: dict[str, Any] = {} if network.dropout is None else {"dropout": network.dropout}
    if network.bn_eps is not None:
        options["norm_layer"] = replace(find_variant(network.name), bn_eps=network.bn_eps).norm_layer()
    with warnings.catch_warnings():
        # That the classifier is new is what training is for.
        warnings.filterwarnings("ignore", ".*classifier is untrained.*")
        return create_model(
            network.name,
            weights=network.weights,
            num_classes=num_classes,
            low_resolution=network.low_resolution,
            stochastic_depth_prob=network.stochastic_depth_prob,
            **options,
        )


def warmed_average(decay: float) -> Any:
    """A moving average for :class:`torch.optim.swa_utils.AveragedModel`, whose decay rises to ``decay``.

    In step n it is at most (1 + n) / (10 + n), as TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.
    """

    def average(averaged: Any, current: Any, count: Any) -> None:
        number = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averaged, current, count)

    return average


def recompute(layer: nn.Module) -> None:
    """Makes a module keep its input alone, and compute the rest again in backward.

    The second time, BatchNorms leave their running statistics as they are.
    """
    inner = layer.forward

    def forward(x: Tensor) -> Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return inner(x)
        contexts = (contextlib.nullcontext(), _kept_statistics(layer))
        return checkpoint(inner, x, use_reentrant=False, context_fn=lambda: contexts)

    layer.forward = forward


@contextlib.contextmanager
def _kept_statistics(layer: nn.Module) -> Iterator[None]:
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
