"""Labelled images: scikit-learn's digits, CIFAR, folders."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effnet_kernels.models.weights.photos import PHOTO_SUFFIXES, load_photo, pillow
from effnet_kernels.train.config import Data


@dataclass(frozen=True)
class Images:
    """Labelled images, by their numbers.

    Attributes:
        classes: the names of the classes.
        labels: each image's class, as an index of ``classes``.
        names: each image's name, to be printed.
        load: from an image's number to an RGB image of PIL; raises OSError or ValueError for one that is unreadable.
    """

    classes: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str]
    load: Callable[[int], Any]

    def subset(self, numbers: Sequence[int]) -> "Images":
        """The images of these numbers."""
        return replace(
            self,
            labels=[self.labels[number] for number in numbers],
            names=[self.names[number] for number in numbers],
            load=partial(_load_one_of, self.load, numbers),
        )


def load_images(data: Data) -> tuple[Images, Images]:
    """The images to train with, and those to validate with.

    Raises:
        OSError: there are no such images, or they could not be downloaded.
        ValueError: the folders do not fit together.
    """
    if data.name == "digits":
        return _split(_digits(), data.held_out)
    if data.name in ("cifar10", "cifar100"):
        return _cifar(data, train=True), _cifar(data, train=False)
    return _folder(Path(data.name), data.held_out)


def _digits() -> Images:
    """1797 handwritten digits of 8x8 pixels (UCI's Optical Recognition of Handwritten Digits, its test part)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    names = [f"digit {number}" for number in range(len(pixels))]
    return Images([str(digit) for digit in range(10)], digits.target.tolist(), names, partial(_load_array, pixels))


def _cifar(data: Data, train: bool) -> Images:
    from torchvision import datasets

    root = Path(data.dir) if data.dir is not None else Path(torch.hub.get_dir(), "datasets")
    kind = datasets.CIFAR10 if data.name == "cifar10" else datasets.CIFAR100
    if data.dir is not None and not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder")
    try:
        # Downloads nothing where the archive is there and has the published checksum.
        found = kind(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{data.name}: expected {kind.filename} in {root}, or a network to download it from, got: {error}"
        ) from error
    part = "train" if train else "test"
    names = [f"{data.name} {part} {number}" for number in range(len(found.data))]
    return Images(found.classes, found.targets, names, partial(_load_array, found.data))


def _folder(path: Path, held_out: float) -> tuple[Images, Images]:
    """A folder for each class, or such folders for training and for validation, in ``train`` and ``val``."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder; names of data sets are digits, cifar10, cifar100")
    if not (path / "train").is_dir():
        return _split(_class_folders(path), held_out)
    validation = next((path / name for name in ("val", "validation", "test") if (path / name).is_dir()), None)
    if validation is None:
        raise FileNotFoundError(f"{path}: expected a folder val, validation or test beside train")
    training, validating = _class_folders(path / "train"), _class_folders(validation)
    if training.classes != validating.classes:
        different = sorted(set(training.classes) ^ set(validating.classes))
        raise ValueError(
            f"{path}: expected the same classes in train and {validation.name}, got {different} in one only"
        )
    return training, validating


def _class_folders(path: Path) -> Images:
    from torchvision.datasets import ImageFolder

    found = ImageFolder(path, is_valid_file=lambda name: Path(name).suffix.lower() in PHOTO_SUFFIXES)
    names = [name for name, _ in found.samples]
    return Images(found.classes, found.targets, names, partial(_load_file, names))


def _split(images: Images, held_out: float) -> tuple[Images, Images]:
    """Two parts with the same share of each class, always the same."""
    from sklearn.model_selection import train_test_split

    training, validation = train_test_split(
        range(len(images.labels)), test_size=held_out, stratify=images.labels, random_state=0
    )
    return images.subset(sorted(training)), images.subset(sorted(validation))


# Functions at the top of a module, which reach worker processes by pickling.
def _load_array(pixels: Any, number: int) -> Any:
    return pillow().fromarray(pixels[number]).convert("RGB")


def _load_file(names: Sequence[str | os.PathLike[str]], number: int) -> Any:
    return load_photo(names[number])


def _load_one_of(load: Callable[[int], Any], numbers: Sequence[int], number: int) -> Any:
    return load(numbers[number])
