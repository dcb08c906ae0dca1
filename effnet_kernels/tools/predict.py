"""From photographs to class names and probabilities."""

import importlib.util
import itertools
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
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


def find_photos(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Photo]:
    """The files that are named, and, in sorted order, those that lie at any depth in the folders that are named.

    They are found as they are asked for, so that any number of them takes the memory of one folder's.

    In folders a photograph is a file with a suffix out of ``PHOTO_SUFFIXES`` and no dot before its name. A file that is
    named is taken as it is, whether it exists or not: opening it raises.

    Raises ValueError for an empty path, which would be the folder that the process is in.
    """
    for path in paths:
        if os.fspath(path) == "":
            raise ValueError("expected the path of a photograph or a folder, got ''")
        for file in _walk(Path(path)) if Path(path).is_dir() else [Path(path)]:
            yield Photo(str(file), partial(load_photo, file))


def _walk(folder: Path) -> Iterator[Path]:
    """The photographs in a folder; folders that cannot be listed, and links to folders, are left out."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = Path(folder, entry.name)
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(path)
        elif not entry.name.startswith(".") and path.suffix.lower() in PHOTO_SUFFIXES:
            yield path


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
    photos: Iterable[Photo],
    preprocess: Callable[[Any], Tensor],
    class_names: Sequence[str] | None = None,
    *,
    topk: int = 5,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Iterator[Prediction]:
    """Classifies photographs in batches, in their order, while the next batch is read.

    One that cannot be read or prepared, or for which the network's output is no number, yields a prediction with an
    error, and the others are classified.

    Args:
        model: maps [N, 3, H, W] to logits [N, classes]; it is moved to ``device`` and set to evaluation.
        preprocess: maps an RGB image of PIL to float32 [3, H, W], of the same H and W for all.
        class_names: one for each output; None for ``class 0``, ``class 1`` ...
        topk: guesses per photograph.
        workers: processes that read photographs; with 0, threads do. Photographs and ``preprocess`` have to be pickled
            for processes.

    Raises ValueError for a batch size or ``topk`` below 1, ``topk`` above the number of classes, and class names that
    are not as many as the classes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")
    model = model.to(device).eval()
    for batch, inputs in _read_ahead(photos, preprocess, batch_size, workers):
        readable = [torch.from_numpy(x) for x in inputs if not isinstance(x, str)]
        guesses = iter(_guess(model, readable, class_names, topk, device) if readable else [])
        for photo, x in zip(batch, inputs, strict=True):
            if isinstance(x, str):
                yield Prediction(photo.name, [], x)
            else:
                found = next(guesses)
                error = None if found else f"{photo.name}: the network's output for it is no number"
                yield Prediction(photo.name, found, error)


def _read_ahead(
    photos: Iterable[Photo], preprocess: Callable[[Any], Tensor], batch_size: int, workers: int
) -> Iterator[tuple[list[Photo], list[Any]]]:
    """Batches of photographs with what :func:`_read` made of them; the next is being read when one is taken."""
    pool: Executor
    if workers > 0:
        # A fork would copy the threads' locks in whatever state they are.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=ignore)
    else:
        pool = ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1))
    remaining = iter(photos)
    reading: deque[tuple[list[Photo], list[Future[Any]]]] = deque()
    with pool:
        try:
            while True:
                batch = list(itertools.islice(remaining, batch_size))
                if batch:
                    reading.append((batch, [pool.submit(_read, photo, preprocess) for photo in batch]))
                if not reading:
                    return
                if len(reading) > 1 or not batch:
                    ready, futures = reading.popleft()
                    yield ready, [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise OSError("a process that read photographs was ended; --workers 0 reads them in this one") from error
        finally:
            # Whoever asks for no more does not wait for what is not read yet.
            pool.shutdown(wait=True, cancel_futures=True)


def _read(photo: Photo, preprocess: Callable[[Any], Tensor]) -> Any:
    """A photograph as an array, which a process can hand over without an open file as a tensor needs; or a reason."""
    try:
        return preprocess(photo.open()).numpy()
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
