"""Networks on the Hugging Face hub, in the layout that timm writes: a configuration and a checkpoint."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.preprocess import ImagePreprocess

PREFIX = "hf-hub:"
# A repository has the first of them, or the second.
_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")
# Arguments of timm's networks that are read here, or change nothing but training.
_ARGUMENTS = {"bn_eps", "drop_path_rate", "drop_rate", "num_classes"}


class HubNetwork(NamedTuple):
    """What a repository's configuration says.

    Attributes:
        repository: its name, such as ``timm/efficientnet_b0.ra_in1k``.
        variant: the network of ours.
        bn_eps: its BatchNorms'.
        preprocess: how photographs are prepared for it.
        classes: their names; None where the configuration has none.
    """

    repository: str
    variant: str
    bn_eps: float
    preprocess: ImagePreprocess
    classes: list[str] | None


def read_hub_network(name: str) -> HubNetwork:
    """The network of ``hf-hub:USER/REPOSITORY``, downloaded or from Hugging Face's cache.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: the configuration is not there, or could not be downloaded.
        ValueError: another name, or a configuration of a network, or of a preprocessing, that is not known here.
    """
    repository = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"expected hf-hub:USER/REPOSITORY, got {name!r}")
    config = json.loads(_fetch(repository, "config.json").read_text(encoding="utf-8"))
    settings = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: expected a configuration of timm's, with pretrained_cfg")
    variant, bn_eps = _variant_of(name, config.get("architecture"))
    arguments = config.get("model_args") or {}
    unknown = sorted(arguments.keys() - _ARGUMENTS)
    if unknown:
        raise ValueError(f"{name}: expected no other arguments of the network than {sorted(_ARGUMENTS)}, got {unknown}")
    bn_eps = arguments.get("bn_eps", bn_eps)
    return HubNetwork(repository, variant, bn_eps, _preprocess_of(name, settings), _classes_of(config, settings))


def fetch_checkpoint(repository: str) -> Path:
    """The file of a repository's weights; raises OSError where there is none."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    usual, other = _CHECKPOINTS
    try:
        return _fetch(repository, usual)
    except OSError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        try:
            return _fetch(repository, other)
        except OSError:
            # A hub that cannot be reached says nothing about the file, which is only not in the cache.
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                raise error from error.__cause__
            raise


def _fetch(repository: str, file: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'networks of the Hugging Face hub need huggingface_hub: pip install "effnet-kernels[hub]"', name=error.name
        ) from error
    try:
        return Path(hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"hf-hub:{repository}: {file} was not found ({reason})") from error


def _variant_of(name: str, architecture: Any) -> tuple[str, float]:
    """The variant of timm's architecture, and the eps of its BatchNorms: TensorFlow's or torch's."""
    found = re.fullmatch(r"(tf_)?efficientnet(v2)?_(\w+)", str(architecture))
    variant = f"{found[1] or ''}efficientnet_{'v2_' if found[2] else ''}{found[3]}" if found else ""
    if found is None or variant not in VARIANTS or (found[3].startswith("v2")):
        raise ValueError(f"{name}: expected an EfficientNet of the released ones, got {architecture!r}")
    return variant, 1e-3 if found[1] else 1e-5


def _preprocess_of(name: str, settings: Mapping[str, Any]) -> ImagePreprocess:
    size = settings.get("test_input_size") or settings.get("input_size")
    share = settings.get("test_crop_pct") or settings.get("crop_pct") or 0.875
    mode, interpolation = settings.get("crop_mode", "center"), settings.get("interpolation")
    if mode not in ("center", "squash") or interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"{name}: expected crop_mode center or squash and interpolation bilinear or bicubic, got {mode!r} and "
            f"{interpolation!r}"
        )
    if not (isinstance(size, list | tuple) and len(size) == 3 and size[0] == 3 and size[1] == size[2]):
        raise ValueError(f"{name}: expected square images of three channels, got the input size {size}")
    mean, std = (tuple(map(float, settings[key])) for key in ("mean", "std"))
    resize = math.floor(size[1] / share)
    return ImagePreprocess(size[1], resize, interpolation, mean, std, mode == "squash")  # type: ignore[arg-type]


def _classes_of(config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str] | None:
    names = config.get("label_names") or settings.get("label_names")
    descriptions = config.get("label_descriptions") or settings.get("label_descriptions") or {}
    return [str(descriptions.get(name, name)) for name in names] if isinstance(names, list) else None
