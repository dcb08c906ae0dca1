"""Classifies a folder of photographs on a Ray cluster: tasks decode them, actors with a frozen engine each classify.

    pip install ".[ray,demo]"
    python examples/ray_predict.py photos/ --workers 2

It prints a line of JSON for each photograph, in any order. Photographs stream through: any number of them takes the
memory of a few batches. One that cannot be read has its reason instead of a class, and stops nothing.
"""

import argparse
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from effnet_kernels import EfficientNet, create_model, freeze, imagenet_classes, resolve_weights
from effnet_kernels.models.weights.photos import PHOTO_SUFFIXES, read_photo
from effnet_kernels.models.weights.preprocess import ImagePreprocess


class Trained(NamedTuple):
    """A trained network, how photographs are prepared for it, and the names of its classes where they are known."""

    network: EfficientNet
    preprocess: ImagePreprocess
    classes: list[str] | None


def load(model: str, weights: str) -> Trained:
    """Trained weights by their name, or the network of a run of ``effnet train`` by its folder."""
    if Path(weights).is_dir():
        from effnet_kernels.train.run import load_run

        run = load_run(weights)
        return Trained(run.network, run.preprocess, run.classes)
    source = resolve_weights(model, weights)
    network = create_model(model, weights=weights)
    names = source.meta.get("categories") or (imagenet_classes() if network.num_classes == 1000 else None)
    return Trained(network, source.transforms(), names)


def decode(preprocess: ImagePreprocess, row: dict[str, Any]) -> dict[str, Any]:
    """The network's input for a file, or zeros and the reason why there is none."""
    try:
        image, error = preprocess(read_photo(io.BytesIO(row["bytes"]), row["path"])).numpy(), ""
    # Decoders and allocators raise errors of many types.
    except Exception as reason:
        image, error = np.zeros((3, preprocess.crop_size, preprocess.crop_size), np.float32), str(reason)
    return {"path": row["path"], "image": image, "error": error}


class Classifier:
    """An actor: the network, frozen for the machine that it runs on."""

    def __init__(self, model: str, weights: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.engine = freeze(load(model, weights).network.to(self.device).eval())

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The likeliest class of each image, and its softmax probability."""
        logits = self.engine(torch.from_numpy(batch["image"]).to(self.device))
        probability, index = logits.float().softmax(1).max(1)
        return {
            "path": batch["path"],
            "index": index.cpu().numpy(),
            "probability": probability.cpu().numpy(),
            "error": batch["error"],
        }


def classify(folder: str, model: str, weights: str, *, workers: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """What is found for each photograph in a folder or bucket, as it is ready: a line of the output."""
    _, preprocess, names = load(model, weights)
    suffixes = [suffix.removeprefix(".") for suffix in PHOTO_SUFFIXES]
    files = ray.data.read_binary_files(folder, include_paths=True, file_extensions=suffixes)
    images = files.map(partial(decode, preprocess), num_cpus=1)
    on_gpu = torch.cuda.is_available()
    found = images.map_batches(
        Classifier,
        fn_constructor_kwargs={"model": model, "weights": weights},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        # Half of a CPU, so that as many actors as CPUs leave room for the tasks that decode.
        num_cpus=0 if on_gpu else 0.5,
        num_gpus=1 if on_gpu else 0,
    )
    for row in found.iter_rows():
        if row["error"]:
            yield {"photo": row["path"], "error": row["error"]}
        else:
            index = int(row["index"])
            name = names[index] if names else f"class {index}"
            yield {"photo": row["path"], "class": name, "probability": float(row["probability"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Classifies photographs on a Ray cluster.")
    parser.add_argument("folder", help="a folder or bucket that all machines reach")
    parser.add_argument("--model", default="efficientnet_lite0", help="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT", help="as for effnet predict, or the folder of a run")
    parser.add_argument("--workers", type=int, default=2, help="actors, each with a GPU where there are GPUs; 2")
    parser.add_argument("--batch-size", type=int, default=32, help="photographs of a call; 32")
    arguments = parser.parse_args()
    options = {"workers": arguments.workers, "batch_size": arguments.batch_size}
    for found in classify(arguments.folder, arguments.model, arguments.weights, **options):
        print(json.dumps(found, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
