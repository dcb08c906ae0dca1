"""What a training run is: sections of typed values, which a recipe fills and a user overrides."""

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from effnet_kernels.models.variants import find_variant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Section(BaseModel):
    """Values that are checked when they are set, and never change. ``"none"`` stands for None, which TOML lacks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, values: Any) -> Any:
        return {k: None if v == "none" else v for k, v in values.items()} if isinstance(values, dict) else values


class Network(Section):
    """The network.

    Attributes:
        name: a released one, such as ``efficientnet_b0``.
        weights: the trained weights that it begins with: a name such as ``DEFAULT``, a URL or a path.
        low_resolution: for images such as CIFAR's 32x32; see :class:`effnet_kernels.EfficientNet`.
        dropout: before the classifier; None for the network's own.
        stochastic_depth_prob: of the last block.
        freeze_epochs: the first epochs, in which the classifier alone is trained.
        bn_eps: of its BatchNorms; None for that of the trained weights, or the network's own.
    """

    name: str = "efficientnet_b0"
    weights: str | None = None
    low_resolution: bool = False
    dropout: float | None = Field(None, ge=0, lt=1)
    stochastic_depth_prob: float = Field(0.2, ge=0, lt=1)
    freeze_epochs: int = Field(0, ge=0)
    bn_eps: float | None = Field(None, gt=0)


class Data(Section):
    """The images.

    Attributes:
        name: ``digits``, ``cifar10``, ``cifar100``, a folder with a folder for each class, or a pattern of WebDataset
            shards such as ``train-{000..099}.tar``.
        dir: where CIFAR's archive is, or is downloaded to; None for a folder in the user's cache.
        held_out: the part of the images of a set without a validation set that is kept for validation.
        image_size: rows and columns of the network's input; None for those that the network is made for.
        resize: the shorter side that an image is resized to for validation, before its middle is taken.
        interpolation: of resized images.
        squash: whether validation resizes both sides to ``resize``; None for what the trained weights expect.
        mean, std: of each channel, for values in [0, 1]; None for those of the trained weights, or ImageNet's.
        batch_size: images of a step, in each process.
        workers: processes that read images; None for what suits the data.
        max_broken: images that may be unreadable before training stops.
        validation, train_images, classes: of shards: the pattern of those to validate with, how many images the others
            hold, and the names of the classes.
    """

    name: str = "digits"
    dir: str | None = None
    held_out: float = Field(0.2, gt=0, lt=1)
    image_size: int | None = Field(None, ge=1)
    resize: int | None = Field(None, ge=1)
    interpolation: Literal["bilinear", "bicubic"] | None = None
    squash: bool | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    batch_size: int = Field(64, ge=2)
    workers: int | None = Field(None, ge=0)
    max_broken: int = Field(0, ge=0)
    validation: str | None = None
    train_images: int | None = Field(None, ge=1)
    classes: tuple[str, ...] | None = None


class Augmentation(Section):
    """How images are changed at random in training.

    Attributes:
        crop: ``resized`` (a part of the image, of random scale and aspect ratio), or ``shift`` (the resized image,
            moved by up to an eighth).
        min_scale: the smallest part of the image's area that ``resized`` takes.
        flip: whether half of the images are mirrored.
        policy: AutoAugment's of ImageNet or CIFAR, RandAugment, TrivialAugment, or None.
        magnitude: RandAugment's.
        erase: the probability of erasing a rectangle.
        mixup, cutmix: the alpha of their beta distribution; 0 for none. With both, one of them at random.
        label_smoothing: of the loss.
    """

    crop: Literal["resized", "shift"] = "resized"
    min_scale: float = Field(0.08, gt=0, le=1)
    flip: bool = True
    policy: Literal["imagenet", "cifar", "randaugment", "trivial"] | None = None
    magnitude: int = Field(9, ge=0, le=30)
    erase: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class Optimizer(Section):
    """How weights are updated.

    Attributes:
        name: any of timm's, such as ``sgd``, ``adamw`` or ``rmsproptf``.
        lr: the highest learning rate.
        lr_batch: the images of a step that ``lr`` is meant for: it grows with the step's images; None leaves it.
        momentum: None for the optimizer's own.
        options: further arguments of the optimizer, such as ``alpha`` or ``eps``.
        weight_decay: of all weights but biases and norms.
        backbone_lr_ratio: the rate of all layers but the classifier, over ``lr``.
    """

    name: str = "sgd"
    lr: float = Field(0.1, gt=0)
    lr_batch: int | None = Field(None, ge=1)
    momentum: float | None = Field(None, ge=0, lt=1)
    options: dict[str, float] = {}
    weight_decay: float = Field(0.0, ge=0)
    backbone_lr_ratio: float = Field(1.0, ge=0)


class Schedule(Section):
    """How long training takes, and the learning rate over time.

    Attributes:
        epochs: passes over the images.
        shape: a half period of a cosine down to 0, or steps down by ``decay_rate`` every ``decay_epochs``.
        warmup_epochs: at first, the rate rises linearly.
    """

    epochs: int = Field(30, ge=1)
    shape: Literal["cosine", "steps"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    decay_rate: float = Field(0.97, gt=0, le=1)
    decay_epochs: float = Field(2.4, gt=0)

    def factor(self, epoch: float) -> float:
        """The rate over the highest, after so many epochs."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.shape == "steps":
            return self.decay_rate ** math.floor(epoch / self.decay_epochs)
        rest = max(self.epochs - self.warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min((epoch - self.warmup_epochs) / rest, 1.0)))


class Progressive(Section):
    """Progressive learning (Tan and Le 2021, section 4): small images and weak regularisation first.

    Attributes:
        stages: equal parts of training. Size, magnitude, mixup and dropout rise linearly from the values here, in the
            first, to those of the other sections, in the last; dropout rises to the released network's where the
            section has None.
    """

    stages: int = Field(1, ge=1)
    image_size: int = Field(128, ge=1)
    magnitude: int = Field(5, ge=0, le=30)
    mixup: float = Field(0.0, ge=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Training(Section):
    """How the steps are computed.

    Attributes:
        seed: of the initial weights, the order of images and all random draws.
        device: ``auto``, ``cpu``, ``cuda`` or another of Lightning's accelerators.
        devices, nodes: processes on a machine, one for each of its devices, and machines; torchrun's own where it runs.
        strategy: what each of several processes holds: all parameters (``ddp``, DistributedDataParallel), or a part of
            each with its gradient and the optimizer's state (``fsdp``, FSDP2's ``fully_shard``).
        sync_batch_norm: whether BatchNorm normalises the batches of all processes as one.
        precision: float32, or mixed precision.
        accumulate: batches whose gradients are added up for a step.
        clip: the largest norm of the gradient; None for any.
        ema: the decay of the moving average of weights and statistics that is validated and kept; 0 for none. In
            step n it is at most (1 + n) / (10 + n).
        checkpoint: whether a stage's activations are computed again in backward instead of kept.
        compile: whether ``torch.compile`` compiles the network.
        deterministic: whether torch refuses operators whose results change from run to run.
        save_minutes: so often, and after each epoch, everything is saved that training goes on from.
        save_steps: the same in steps; None for minutes alone.
    """

    seed: int = Field(0, ge=0)
    device: str = "auto"
    devices: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    sync_batch_norm: bool = False
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(None, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)
    checkpoint: bool = False
    compile: bool = False
    deterministic: bool = False
    save_minutes: float = Field(10.0, gt=0)
    save_steps: int | None = Field(None, ge=1)


class Config(Section):
    """Everything that a run depends on. ``recipe`` is the name of the table that it began with."""

    recipe: str = ""
    network: Network = Network()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    progressive: Progressive = Progressive()
    training: Training = Training()

    def override(self, values: dict[str, Any]) -> "Config":
        """This with other values, by section and name, for some.

        Raises ValueError that names each value that is unknown or does not fit.
        """
        try:
            return Config.model_validate(merge(self.model_dump(), values))
        except ValidationError as error:
            raise ValueError("\n".join(map(_in_words, error.errors()))) from error

    def at_epoch(self, epoch: int) -> "Config":
        """This with the values of the stage of progressive learning that ``epoch`` belongs to."""
        stages = self.progressive.stages
        if stages == 1:
            return self
        share = min(epoch * stages // self.schedule.epochs, stages - 1) / (stages - 1)

        def between(first: float, last: float) -> float:
            return first + (last - first) * share

        first, augmentation, dropout = self.progressive, self.augmentation, self.network.dropout
        if dropout is None:
            dropout = find_variant(self.network.name).dropout
        size = self.data.image_size or first.image_size
        return self.override(
            {
                "data": {"image_size": round(between(min(first.image_size, size), size))},
                "augmentation": {
                    "magnitude": round(between(first.magnitude, augmentation.magnitude)),
                    "mixup": between(first.mixup, augmentation.mixup),
                },
                "network": {"dropout": between(first.dropout, dropout)},
            }
        )

    def to_toml(self) -> str:
        """This as TOML, of which :func:`read_config` and :meth:`override` make the same."""
        import tomli_w

        sections = self.model_dump()
        for name, section in sections.items():
            if isinstance(section, dict):
                sections[name] = {key: "none" if value is None else value for key, value in section.items()}
        return tomli_w.dumps(sections)

    def processes(self) -> tuple[int, int]:
        """Processes on this machine, and machines."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            return local, int(os.environ["WORLD_SIZE"]) // local
        return self.training.devices, self.training.nodes

    def differences(self, other: "Config") -> list[str]:
        """The names of the values that are not the same."""
        ours, theirs = self.model_dump(), other.model_dump()
        names = ["recipe"] if self.recipe != other.recipe else []
        for section, values in ours.items():
            if isinstance(values, dict):
                names += [f"{section}.{name}" for name, value in values.items() if theirs[section][name] != value]
        return names


def read_config(path: Path) -> dict[str, Any]:
    """The values in a TOML file, by section.

    Raises OSError where it cannot be read, ValueError where it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from error


def parse_settings(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Values, by section, of texts such as ``optimizer.lr=0.1``: the value as in TOML, or any other text as it is.

    Raises ValueError for a text of another form.
    """
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, _, key = name.strip().partition(".")
        if not (equals and section and key):
            raise ValueError(f"expected SECTION.NAME=VALUE, such as optimizer.lr=0.1, got {setting!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text.strip()
        entries = values.setdefault(section, {})
        *groups, key = key.split(".")
        for group in groups:
            entries = entries.setdefault(group, {})
        entries[key] = value
    return values


def merge(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Values by section and name, with ``others`` over them."""
    made = dict(values)
    for name, other in others.items():
        value = made.get(name)
        made[name] = merge(value, other) if isinstance(value, dict) and isinstance(other, dict) else other
    return made


def _in_words(error: Any) -> str:
    place, got = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(error["loc"][0]))
        known = getattr(section.annotation, "model_fields", Config.model_fields) if section else Config.model_fields
        return f"{place}: there is no such value; expected one of {', '.join(known)}"
    return f"{place}: {error['msg'].lower()}, got {got!r}"
