"""A trained network in the forms that others read."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from effnet_kernels.inference.freeze import freeze
from effnet_kernels.models.variants import find_variant
from effnet_kernels.models.weights.convert import convert_state_dict
from effnet_kernels.train.run import TrainedRun

# What each form is written to, in the run's folder.
FORMS = {"onnx": "network.onnx", "engine": "engine.pt", "safetensors": "network.safetensors", "timm": "timm"}


def export(run: TrainedRun, form: str, path: Path) -> None:
    """Writes a run's network.

    Args:
        form: ``onnx``, for any batch of images of the run's size; ``engine``, the frozen network, which
            ``torch.load(path, weights_only=False)`` gives back; ``safetensors``, torchvision's keys, with the classes
            and the preprocessing as metadata; or ``timm``, a folder in the layout of the Hugging Face hub, for
            ``timm.create_model("local-dir:PATH")``, or to be uploaded.
        path: the file, or for ``timm`` the folder.

    Raises ValueError for a network that timm does not have, OSError where ``path`` cannot be written.
    """
    if form == "onnx":
        size = run.preprocess.crop_size
        images = torch.zeros(2, 3, size, size)
        batch = torch.export.Dim("batch")
        torch.onnx.export(run.network, (images,), path, dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False)
    elif form == "engine":
        torch.save(freeze(run.network), path)
    elif form == "safetensors":
        _save_tensors(run.network.state_dict(), path, {name: json.dumps(v) for name, v in _description(run).items()})
    else:
        config = _timm_config(run)
        tensors = convert_state_dict(run.network.state_dict(), "timm")
        path.mkdir(parents=True, exist_ok=True)
        _save_tensors(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _description(run: TrainedRun) -> dict[str, Any]:
    """The network, its classes, and how photographs are prepared for it."""
    preprocess = run.preprocess
    return {
        "network": run.config.network.model_dump(),
        "classes": run.classes,
        "size": int(preprocess.crop_size),
        "resize": int(preprocess.resize_size),
        "squash": preprocess.squash,
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean,
        "std": preprocess.std,
    }


def _timm_config(run: TrainedRun) -> dict[str, Any]:
    network, preprocess = run.config.network, run.preprocess
    if network.low_resolution:
        raise ValueError("expected a network that timm has, got one for small images (network.low_resolution)")
    if network.name.startswith("efficientnet_v2_b"):
        raise ValueError(f"expected a network that timm has, such as tf_{network.name}, got {network.name}")
    size, resize = int(preprocess.crop_size), int(preprocess.resize_size)
    # timm rounds down to whole pixels.
    share = size / resize if math.floor(size / (size / resize)) == resize else size / (resize + 0.5)
    bn_eps = find_variant(network.name).bn_eps if network.bn_eps is None else network.bn_eps
    return {
        "architecture": re.sub("efficientnet_v2_", "efficientnetv2_", network.name),
        "num_classes": len(run.classes),
        "num_features": run.network.num_features,
        "model_args": {"bn_eps": bn_eps},
        "label_names": run.classes,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "crop_pct": share,
            "crop_mode": "squash" if preprocess.squash else "center",
            "interpolation": preprocess.interpolation,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": len(run.classes),
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }
