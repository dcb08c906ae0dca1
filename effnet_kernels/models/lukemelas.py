"""The names of networks, settings and checkpoints in lukemelas's package `efficientnet_pytorch`."""

from dataclasses import replace
from typing import Any, NamedTuple

from effnet_kernels.models.variants import Variant, find_variant

_RELEASES = "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"

# Checkpoints of the package's release 1.0: trained with AutoAugment, and with AdvProp.
_CHECKPOINTS = {
    "efficientnet-b0": ("efficientnet-b0-355c32eb.pth", "adv-efficientnet-b0-b64d5a18.pth"),
    "efficientnet-b1": ("efficientnet-b1-f1951068.pth", "adv-efficientnet-b1-0f3ce85a.pth"),
    "efficientnet-b2": ("efficientnet-b2-8bb594d6.pth", "adv-efficientnet-b2-6e9d97e5.pth"),
    "efficientnet-b3": ("efficientnet-b3-5fb5a3c3.pth", "adv-efficientnet-b3-cdd7c0f4.pth"),
    "efficientnet-b4": ("efficientnet-b4-6ed6700e.pth", "adv-efficientnet-b4-44fb3a87.pth"),
    "efficientnet-b5": ("efficientnet-b5-b6417697.pth", "adv-efficientnet-b5-86493f6b.pth"),
    "efficientnet-b6": ("efficientnet-b6-c76e70fd.pth", "adv-efficientnet-b6-ac80338e.pth"),
    "efficientnet-b7": ("efficientnet-b7-dcc49843.pth", "adv-efficientnet-b7-4652b6dd.pth"),
    "efficientnet-b8": (None, "adv-efficientnet-b8-22a8fe65.pth"),
}


class GlobalParams(NamedTuple):
    """The settings that a network was made with, by that package's names; changing them later changes nothing."""

    width_coefficient: float
    depth_coefficient: float
    image_size: int | None
    dropout_rate: float
    num_classes: int
    batch_norm_momentum: float
    batch_norm_epsilon: float
    drop_connect_rate: float
    depth_divisor: int = 8
    min_depth: int | None = None
    include_top: bool = True


def variant_of(model_name: str) -> Variant:
    """The row of the table for that package's name; raises ValueError where there is none."""
    return find_variant("tf_" + model_name.replace("-", "_") if isinstance(model_name, str) else model_name)


def checkpoint_of(model_name: str, advprop: bool) -> str:
    """The URL of the trained weights of that name; raises ValueError for a name without any."""
    released = {name: files[int(advprop)] for name, files in _CHECKPOINTS.items() if files[int(advprop)]}
    checkpoint = released.get(model_name)
    if checkpoint is None:
        kind = "AdvProp's" if advprop else "released"
        raise ValueError(
            f"model_name: expected one with {kind} weights out of {', '.join(released)}, got {model_name!r}"
        )
    return _RELEASES + checkpoint


def overridden(variant: Variant, params: dict[str, Any]) -> tuple[Variant, dict[str, Any]]:
    """The variant and the options of our constructor that the overrides ``params`` stand for.

    Raises ValueError for an override that is not known.
    """
    params = dict(params)
    params.pop("image_size", None)
    options: dict[str, Any] = {}
    if not params.pop("include_top", True):
        params["num_classes"] = 0
    for theirs, ours in (("num_classes", "num_classes"), ("drop_connect_rate", "stochastic_depth_prob")):
        if theirs in params:
            options[ours] = params.pop(theirs)
    changes: dict[str, Any] = {}
    for theirs, ours in (
        ("width_coefficient", "width"),
        ("depth_coefficient", "depth"),
        ("dropout_rate", "dropout"),
        ("batch_norm_epsilon", "bn_eps"),
    ):
        if theirs in params:
            changes[ours] = params.pop(theirs)
    if "batch_norm_momentum" in params:
        changes["bn_momentum"] = 1 - params.pop("batch_norm_momentum")
    if params:
        known = ", ".join(name for name in GlobalParams._fields if name not in ("depth_divisor", "min_depth"))
        raise ValueError(f"override_params: expected some of {known}, got {', '.join(params)}")
    return replace(variant, **changes), options
