"""From photographs to class names and probabilities."""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effnet_kernels.models.weights.photos import PHOTO_SUFFIXES, load_photo, pillow, reason_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Photo:
    """A name to print, and how to get the photograph as an RGB image of PIL."""

    name: str
    open: Callable[[], "Image"]


@dataclass(frozen=True)
class Guess:
    """A class: its name, its index among the classifier's outputs, and its softmax probability."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The network's guesses for one photograph, the likeliest first, or why it could not be read."""

    photo: str
    guesses: list[Guess]
    error: str | None = None


def find_photos(paths: Iterable[str | os.PathLike[str]]) -> list[Photo]:
    """The files that are named, and, in sorted order, those that lie at any depth in the folders that are named.

    In folders a photograph is a file with a suffix out of ``PHOTO_SUFFIXES`` and no dot before its name. A file that is
    named is taken as it is, whether it exists or not: opening it raises.

    Raises ValueError for an empty path, which would be the folder that the process is in.
    """
    files: list[Path] = []
    for path in paths:
        if os.fspath(path) == "":
            raise ValueError("expected the path of a photograph or a folder, got ''")
        files += sorted(_walk(Path(path))) if Path(path).is_dir() else [Path(path)]
    return [Photo(str(file), partial(load_photo, file)) for file in files]


def _walk(folder: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in PHOTO_SUFFIXES:
                yield Path(directory, name)


def demo_photos() -> list[Photo]:
    """scikit-image's chelsea (a cat), rocket and coffee.

    Raises ModuleNotFoundError, with the command that installs it, where scikit-image is missing.
    """
    if importlib.util.find_spec("skimage") is None:
        raise ModuleNotFoundError(
            'the demo photographs are in scikit-image: pip install "effnet-kernels[demo]"', name="skimage"
        )

    return [Photo(name, partial(_demo_photo, name)) for name in ("chelsea", "rocket", "coffee")]


def _demo_photo(name: str) -> "Image":
    import skimage.data

    return pillow().fromarray(getattr(skimage.data, name)())


def predict(
    model: nn.Module,
    photos: Sequence[Photo],
    preprocess: Callable[[Any], Tensor],
    class_names: Sequence[str] | None = None,
    *,
    topk: int = 5,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Iterator[Prediction]:
    """Classifies photographs in batches, in their order.

    One that cannot be read or prepared, or for which the network's output is no number, yields a prediction with an
    error, and the others are classified.

    Args:
        model: maps [N, 3, H, W] to logits [N, classes]; it is moved to ``device`` and set to evaluation.
        preprocess: maps an RGB image of PIL to float32 [3, H, W], of the same H and W for all.
        class_names: one for each output; None for ``class 0``, ``class 1`` ...
        topk: guesses per photograph.

    Raises ValueError for a batch size or ``topk`` below 1, ``topk`` above the number of classes, and class names that
    are not as many as the classes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    model = model.to(device).eval()
    with ThreadPoolExecutor(max_workers=min(batch_size, os.cpu_count() or 1)) as pool:
        for start in range(0, len(photos), batch_size):
            batch = photos[start : start + batch_size]
            inputs = list(pool.map(lambda photo: _read(photo, preprocess), batch))
            readable = [x for x in inputs if isinstance(x, Tensor)]
            guesses = iter(_guess(model, readable, class_names, topk, device) if readable else [])
            for photo, x in zip(batch, inputs, strict=True):
                if isinstance(x, str):
                    yield Prediction(photo.name, [], x)
                else:
                    found = next(guesses)
                    error = None if found else f"{photo.name}: the network's output for it is no number"
                    yield Prediction(photo.name, found, error)


def _read(photo: Photo, preprocess: Callable[[Any], Tensor]) -> Tensor | str:
    try:
        return preprocess(photo.open())
    # A package that is not installed is missing for all photographs.
    except ModuleNotFoundError:
        raise
    # Decoders and allocators raise errors of many types.
    except Exception as error:
        reason = reason_of(error)
        return reason if photo.name in reason else f"{photo.name}: {reason}"


@torch.inference_mode()
def _guess(
    model: nn.Module,
    inputs: list[Tensor],
    class_names: Sequence[str] | None,
    topk: int,
    device: torch.device | str,
) -> list[list[Guess]]:
    """The guesses for each of the inputs; none where the network's output is no number."""
    logits = model(torch.stack(inputs).to(device))
    classes = logits.shape[1]
    if topk > classes:
        raise ValueError(f"topk: expected at most {classes}, the number of classes, got {topk}")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names: expected {classes}, one for each output of the model, got {len(class_names)}")
    top = logits.float().softmax(dim=1).topk(topk)
    return [
        [Guess(class_names[i] if class_names else f"class {i}", i, p) for i, p in zip(indices, row, strict=True)]
        if all(map(math.isfinite, row))
        else []
        for indices, row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def progress_bar(predictions: Iterable[Prediction], total: int) -> Iterable[Prediction]:
    """The same, with a progress bar if stderr is a terminal, tqdm is installed and there are several photographs."""
    if total < 2 or sys.stderr is None or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return predictions
    from tqdm import tqdm

    return tqdm(predictions, total=total, unit="photo", file=sys.stderr)
