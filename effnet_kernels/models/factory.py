"""The released networks by name."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.variants import VARIANTS, Variant, find_variant
from effnet_kernels.models.weights.convert import count_classes, has_classifier, load_checkpoint
from effnet_kernels.models.weights.formats import NUMBERED, detect_format, stem_weight
from effnet_kernels.models.weights.pretrained import resolve_weights, weights_of
from effnet_kernels.models.weights.wrappers import unwrap

__all__ = [
    "build",
    "create_model",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_b8",
    "efficientnet_l2",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
    "efficientnet_v2_b0",
    "efficientnet_v2_b1",
    "efficientnet_v2_b2",
    "efficientnet_v2_b3",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "efficientnet_v2_xl",
    "tf_efficientnet_b0",
    "tf_efficientnet_b1",
    "tf_efficientnet_b2",
    "tf_efficientnet_b3",
    "tf_efficientnet_b4",
    "tf_efficientnet_b5",
    "tf_efficientnet_b6",
    "tf_efficientnet_b7",
    "tf_efficientnet_b8",
    "tf_efficientnet_l2",
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
    "tf_efficientnet_lite3",
    "tf_efficientnet_lite4",
    "tf_efficientnet_v2_b0",
    "tf_efficientnet_v2_b1",
    "tf_efficientnet_v2_b2",
    "tf_efficientnet_v2_b3",
    "tf_efficientnet_v2_l",
    "tf_efficientnet_v2_m",
    "tf_efficientnet_v2_s",
    "tf_efficientnet_v2_xl",
]


def build(variant: Variant, **kwargs: Any) -> EfficientNet:
    """A network of ``variant``, with initial weights; see :meth:`EfficientNet.of_variant`."""
    return EfficientNet.of_variant(variant, **kwargs)


def create_model(
    name: str, *, weights: Any = None, progress: bool = True, strict: bool = False, **kwargs: Any
) -> EfficientNet:
    """A released network, trained where ``weights`` are given.

    Args:
        name: ``efficientnet_b0`` ... ``b8``, ``l2``, ``lite0`` ... ``lite4``, ``v2_s``, ``v2_m``, ``v2_l``, ``v2_xl``,
            ``v2_b0`` ... ``v2_b3``; with ``tf_`` before it for TensorFlow's SAME padding and BatchNorm settings.
        weights: the name or member of a weight enum, an http(s) URL, or a path to ``.pth`` or ``.safetensors``, in
            torchvision's, timm's, lukemelas's or transformers' format; ``hf-hub:USER/REPOSITORY`` in timm's layout,
            such as ``hf-hub:timm/efficientnet_b0.ra_in1k``; None for initial weights.
        progress: whether a download shows its progress.
        strict: whether another ``num_classes`` than the weights' is an error. Otherwise the backbone is loaded, the
            classifier keeps its initial weights, and a warning says so.
        **kwargs: arguments of :class:`EfficientNet`; ``num_classes`` is the weights' if it is not given, and 0 leaves
            their classifier out. With other than 3 ``in_chans`` the stem's weights for RGB are adapted as timm does.
            ``pretrained`` is taken with a warning, as torchvision does: True stands for ``weights="IMAGENET1K_V1"``.

    Raises:
        ValueError: an unknown name, an argument or weights that do not fit.
        TypeError: an argument that does not exist.
    """
    variant = find_variant(name)
    weights = _checked_weights(name, weights, kwargs)
    if weights is None:
        return build(variant, **kwargs)
    source = resolve_weights(name, weights)
    state_dict = unwrap(source.get_state_dict(progress=progress, check_hash=True))
    # Weights of our table bring the settings that they were trained with: the Lite ones are TensorFlow's.
    variant = find_variant(source.variant or name)
    if source.bn_eps is not None:
        variant = replace(variant, bn_eps=source.bn_eps)
    form = detect_format(state_dict)
    if source.variant == "" and variant.padding != "same" and form in NUMBERED:
        warnings.warn(
            f"the checkpoint is in {form}'s format, whose networks have SAME padding and BatchNorm eps 1e-3: "
            f"'tf_{name}' computes what it was trained for",
            stacklevel=2,
        )
    classes, is_asked = count_classes(state_dict), "num_classes" in kwargs
    # A classifier of several layers is left for the loading to refuse by name, unless another one is asked for.
    if not is_asked and (classes > 0 or not has_classifier(state_dict)) and not kwargs.get("features_only"):
        kwargs["num_classes"] = classes
    model = build(variant, **kwargs)
    is_new = is_asked and model.num_classes not in (0, classes)
    if is_new and strict:
        raise ValueError(f"num_classes: expected {classes}, which the weights have, or 0, got {model.num_classes}")
    load_checkpoint(model, _adapt_stem(state_dict, stem_weight(form), model.in_chans), skip_classifier=is_new)
    if is_new:
        found = f"{classes} classes" if classes else "no such classifier"
        warnings.warn(
            f"the weights have {found} and num_classes is {model.num_classes}: the backbone is loaded and the "
            "classifier is untrained; strict=True refuses this",
            stacklevel=2,
        )
    return model


def _checked_weights(name: str, weights: Any, kwargs: dict[str, Any]) -> Any:
    """``weights``, also where they were asked for by ``pretrained``, which is taken out of ``kwargs``."""
    if "pretrained" in kwargs or isinstance(weights, bool):
        if weights is not None and not isinstance(weights, bool):
            raise TypeError(f"pretrained: expected it or weights, got both, weights={weights!r}")
        trained = kwargs.pop("pretrained", weights)
        weights = "IMAGENET1K_V1" if trained else None
        warnings.warn(
            f"pretrained={trained!r} is deprecated, as in torchvision: weights={weights!r} is the same", stacklevel=3
        )
    # A word that could be a file's name, where there is no such file, is meant as a name of weights.
    elif isinstance(weights, str) and re.fullmatch(r"[\w-]*[a-z][\w-]*", weights) and not Path(weights).exists():
        enum = weights_of(name)
        names = "" if enum is None else f"one of {', '.join(enum.__members__)}, "
        raise ValueError(f"weights: expected {names}a URL or the path of a file for {name}, got {weights!r}")
    return weights


def _adapt_stem(state_dict: dict[str, Tensor], key: str, in_chans: int) -> dict[str, Tensor]:
    """Weights for images of ``in_chans`` channels from weights for RGB, as timm adapts them.

    The sum over the channels for one; else the channels repeated, scaled so that outputs keep their size. Weights for
    other images than RGB stay as they are.
    """
    rgb = state_dict.get(key)
    if rgb is None or rgb.dim() != 4 or rgb.shape[1] != 3 or in_chans == 3:
        return state_dict
    if in_chans == 1:
        adapted = rgb.sum(dim=1, keepdim=True)
    else:
        adapted = rgb.repeat(1, -(-in_chans // 3), 1, 1)[:, :in_chans] * (3 / in_chans)
    return {**state_dict, key: adapted}


class Size(NamedTuple):
    """The cost of a network: parameters, and multiply-accumulates of one image at its resolution."""

    parameters: int
    macs: int
    resolution: int


def measure(variant: Variant) -> Size:
    """Parameters and multiply-accumulates, counted on a network without storage; nothing is computed."""
    # Importing it imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build(variant).eval()
        image = torch.empty(1, 3, variant.resolution, variant.resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    parameters = sum(p.numel() for p in model.parameters())
    return Size(parameters, counter.get_total_flops() // 2, variant.resolution)


class Builder(Protocol):
    """A variant's builder: :func:`create_model` with the name given."""

    __name__: str

    def __call__(self, weights: Any = None, progress: bool = True, **kwargs: Any) -> EfficientNet: ...


def _builder(name: str) -> Builder:
    def builder(weights: Any = None, progress: bool = True, **kwargs: Any) -> EfficientNet:
        return create_model(name, weights=weights, progress=progress, **kwargs)

    variant = VARIANTS[name]
    builder.__name__ = builder.__qualname__ = name
    builder.__module__ = __name__
    builder.__doc__ = (
        f"``create_model({name!r}, ...)``: width {variant.width:g}, depth {variant.depth:g}, "
        f"resolution {variant.resolution}, dropout {variant.dropout:g}, {variant.padding} padding."
    )
    return builder


def _builders(name: str) -> tuple[Builder, Builder]:
    """The builders of a released network and of its ``tf_`` sibling."""
    return _builder(name), _builder(f"tf_{name}")


efficientnet_b0, tf_efficientnet_b0 = _builders("efficientnet_b0")
efficientnet_b1, tf_efficientnet_b1 = _builders("efficientnet_b1")
efficientnet_b2, tf_efficientnet_b2 = _builders("efficientnet_b2")
efficientnet_b3, tf_efficientnet_b3 = _builders("efficientnet_b3")
efficientnet_b4, tf_efficientnet_b4 = _builders("efficientnet_b4")
efficientnet_b5, tf_efficientnet_b5 = _builders("efficientnet_b5")
efficientnet_b6, tf_efficientnet_b6 = _builders("efficientnet_b6")
efficientnet_b7, tf_efficientnet_b7 = _builders("efficientnet_b7")
efficientnet_b8, tf_efficientnet_b8 = _builders("efficientnet_b8")
efficientnet_l2, tf_efficientnet_l2 = _builders("efficientnet_l2")
efficientnet_lite0, tf_efficientnet_lite0 = _builders("efficientnet_lite0")
efficientnet_lite1, tf_efficientnet_lite1 = _builders("efficientnet_lite1")
efficientnet_lite2, tf_efficientnet_lite2 = _builders("efficientnet_lite2")
efficientnet_lite3, tf_efficientnet_lite3 = _builders("efficientnet_lite3")
efficientnet_lite4, tf_efficientnet_lite4 = _builders("efficientnet_lite4")
efficientnet_v2_s, tf_efficientnet_v2_s = _builders("efficientnet_v2_s")
efficientnet_v2_m, tf_efficientnet_v2_m = _builders("efficientnet_v2_m")
efficientnet_v2_l, tf_efficientnet_v2_l = _builders("efficientnet_v2_l")
efficientnet_v2_xl, tf_efficientnet_v2_xl = _builders("efficientnet_v2_xl")
efficientnet_v2_b0, tf_efficientnet_v2_b0 = _builders("efficientnet_v2_b0")
efficientnet_v2_b1, tf_efficientnet_v2_b1 = _builders("efficientnet_v2_b1")
efficientnet_v2_b2, tf_efficientnet_v2_b2 = _builders("efficientnet_v2_b2")
efficientnet_v2_b3, tf_efficientnet_v2_b3 = _builders("efficientnet_v2_b3")
