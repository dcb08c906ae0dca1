"""The interface of lukemelas's package `efficientnet_pytorch`."""

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

from effnet_kernels.models.variants import Variant, find_variant
from effnet_kernels.models.weights.convert import load_checkpoint
from effnet_kernels.models.weights.pretrained import resolve_weights

Network = TypeVar("Network")
"""The class whose ``of_variant`` makes a network."""
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
    """What a network was made with, in that package's words; changing it later changes nothing."""

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


def from_name(cls: type[Network], model_name: str, in_channels: int, **override_params: Any) -> Network:
    """The network of that name, as `efficientnet_pytorch` builds it: SAME padding, BatchNorm eps 1e-3, momentum 0.01.

    Its padding is decided by the size of each input; that package fixes it from ``image_size`` at construction, and the
    two agree on images of that size.

    Args:
        model_name: ``efficientnet-b0`` ... ``efficientnet-b8``, ``efficientnet-l2``, ``efficientnet-lite0`` ...
        in_channels: channels of the image.
        **override_params: ``num_classes``, ``dropout_rate``, ``drop_connect_rate``, ``width_coefficient``,
            ``depth_coefficient``, ``batch_norm_epsilon``, ``batch_norm_momentum`` (the share of the old statistics, as
            TensorFlow counts), ``include_top`` (False: pooled features [N, C], in that package [N, C, 1, 1]) and
            ``image_size`` (without effect).

    Raises ValueError for a name or an override that is none of these.
    """
    released = variant_of(model_name)
    variant, options = _overridden(released, override_params)
    model: Any = cast(Any, cls).of_variant(variant, in_chans=in_channels, **options)
    model._global_params = GlobalParams(
        width_coefficient=variant.width,
        depth_coefficient=variant.depth,
        image_size=override_params.get("image_size", released.resolution),
        dropout_rate=variant.dropout,
        num_classes=override_params.get("num_classes", 1000),
        batch_norm_momentum=1 - variant.bn_momentum,
        batch_norm_epsilon=variant.bn_eps,
        drop_connect_rate=override_params.get("drop_connect_rate", 0.2),
        include_top=override_params.get("include_top", True),
    )
    return model


def from_pretrained(
    cls: type[Network],
    model_name: str,
    weights_path: str | None,
    advprop: bool,
    in_channels: int,
    num_classes: int,
    **override_params: Any,
) -> Network:
    """:func:`from_name` with trained weights, from ``weights_path`` or from that package's release.

    A classifier of other than 1000 classes, and a stem of other than 3 channels, keep their initial weights.

    Raises ValueError for a name without released weights, and for weights that do not fit.
    """
    if weights_path is None:
        kind = "AdvProp's" if advprop else "released"
        released = {name: files[int(advprop)] for name, files in _CHECKPOINTS.items() if files[int(advprop)]}
        checkpoint = released.get(model_name)
        if checkpoint is None:
            raise ValueError(
                f"model_name: expected one with {kind} weights out of {', '.join(released)}, got {model_name!r}"
            )
        weights_path = _RELEASES + checkpoint
    model: Any = from_name(cls, model_name, in_channels, num_classes=num_classes, **override_params)
    state_dict = resolve_weights("tf_" + model_name.replace("-", "_"), weights_path).get_state_dict()
    load_checkpoint(model, state_dict, skip_classifier=num_classes != 1000, skip_stem=in_channels != 3)
    return model


def _overridden(variant: Variant, params: dict[str, Any]) -> tuple[Variant, dict[str, Any]]:
    """The variant and the options of the constructor that the overrides stand for."""
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
