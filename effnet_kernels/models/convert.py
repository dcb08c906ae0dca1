"""State dicts of EfficientNets in the formats of torchvision, timm, lukemelas and transformers, converted.

What neither keys nor shapes reveal, BatchNorm's settings and the padding, is carried as :class:`Settings`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from effnet_kernels.models.configs import VARIANTS, Variant
from effnet_kernels.models.efficientnet import EfficientNet, build
from effnet_kernels.models.formats import (
    FORMATS,
    Format,
    detect_format,
    is_beyond,
    is_classifier,
    layout_of,
    module_names,
    roles_of,
    stem_weight,
)
from effnet_kernels.models.wrappers import unwrap
from effnet_kernels.modules import FusedMBConvConfig
from effnet_kernels.modules.conv_bn_act import PaddingMode
from effnet_kernels.modules.inverted_residual import InvertedResidual
from effnet_kernels.peer_blocks import is_block, unwrapped
from effnet_kernels.verification import SIZES, Observed, agree, first_difference


def convert_state_dict(
    state_dict: Mapping[str, Any], to: Format = "torchvision", *, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """The same tensors under the keys of another format.

    Padding, BatchNorm eps and momentum are not part of a state dict: see :func:`settings_of` and :func:`from_peer`.

    Args:
        state_dict: of a whole network, in any format, wrapped and prefixed or not.
        to: ``"torchvision"`` (ours), ``"timm"``, ``"lukemelas"`` or ``"transformers"``.
        like: a model with the same blocks. The last two number blocks without their stages; without ``like`` a stage is
            taken to begin where the channels, the kernel or the expansion change.

    Raises ValueError for keys of no known format and for blocks that ``to`` has no names for.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    state_dict = unwrap(state_dict)
    source = detect_format(state_dict)
    layout = layout_of(state_dict if like is None else like.state_dict())
    renamed = dict(zip(module_names(source, layout), module_names(to, layout), strict=True))
    converted, strangers = {}, []
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if module in renamed:
            converted[f"{renamed[module]}.{leaf}"] = value
        else:
            strangers.append(key)
    if strangers:
        raise ValueError(f"expected the keys of an EfficientNet in {source}'s format, got {_first(strangers)}")
    return converted


def load_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Any], *, skip_classifier: bool = False, skip_stem: bool = False
) -> None:
    """Loads a state dict of any format, wrapped and prefixed or not, into a model of ours or of a peer.

    A model without classifier or without head takes what it has a place for. BatchNorm counters that old checkpoints
    lack stay as they are.

    Args:
        skip_classifier, skip_stem: leave the classifier, or the first convolution, as it is.

    Raises ValueError that names the first missing, unexpected, misshapen and unfit keys (in the checkpoint's own names)
    and the variant that the checkpoint seems to be of. All is checked before the first copy: the model is untouched.
    """
    state_dict = unwrap(checkpoint)
    own = model.state_dict()
    source, layout = detect_format(state_dict), layout_of(own)
    theirs, ours = module_names(source, layout), module_names(detect_format(own), layout)
    module_of = dict(zip(ours, theirs, strict=True))
    skipped = {ours[-1]} if skip_classifier else set()
    if skip_stem:
        skipped.add(ours[0])

    wanted, skipped_keys = {}, set()
    for key in own:
        module, _, leaf = key.rpartition(".")
        name = f"{module_of[module]}.{leaf}" if module in module_of else key
        if module in skipped:
            skipped_keys.add(name)
        else:
            wanted[name] = key
    ends = {own_name for own_name in ours if any(key.startswith(f"{own_name}.") for key in own)}
    classifies, has_head = ours[-1] in ends, ours[-3] in ends
    unexpected = [
        key
        for key in state_dict
        if key not in wanted
        and key not in skipped_keys
        and not ((skip_classifier or not classifies) and is_classifier(key, source))
        and not (not has_head and is_beyond(key, source, layout))
    ]
    missing = [key for key in wanted if key not in state_dict and not key.endswith(".num_batches_tracked")]
    targets = {key: own[wanted[key]] for key in state_dict if key in wanted}
    misshapen = [key for key, target in targets.items() if state_dict[key].shape != target.shape]
    if missing or unexpected or misshapen:
        raise ValueError(_misfit(source, missing, unexpected, misshapen, state_dict, targets, own))
    for key, target in targets.items():
        _check_copy(key, state_dict[key], target)
    model.load_state_dict({wanted[key]: state_dict[key] for key in targets}, strict=False)


def _check_copy(key: str, value: Tensor, target: Tensor) -> None:
    """Raises ValueError where a tensor cannot be copied into another, or would become other numbers."""
    if target.is_floating_point() and not value.is_floating_point():
        raise ValueError(f"{key!r}: expected a floating-point tensor, got {value.dtype}")
    if value.is_meta and not target.is_meta:
        raise ValueError(f"{key!r}: expected a tensor with data, got one on the meta device")
    try:
        with torch.no_grad():
            torch.empty_like(target).copy_(value)
    # Subclasses of Tensor have errors of their own.
    except Exception as error:
        raise ValueError(
            f"{key!r}: expected a tensor that can be copied, got a {type(value).__name__}: {error}"
        ) from error


def guess_variant(state_dict: Mapping[str, Tensor]) -> Variant | None:
    """The released network with these blocks and channels, or None.

    It is never a ``tf_`` one: those have the same tensors.
    """
    try:
        form, layout = detect_format(state_dict), layout_of(state_dict)
    except ValueError:
        return None
    names = iter(module_names(form, layout)[2:])
    signature = []
    for stage in layout:
        channels = 0
        for kind in stage:
            modules = [next(names) for _ in roles_of(kind)]
            weight = state_dict.get(f"{modules[-2]}.weight")
            channels = channels if weight is None or weight.dim() == 0 else weight.shape[0]
        signature.append((stage[-1].squeezes, len(stage), channels))
    for variant in VARIANTS.values():
        configs = variant.block_configs()
        if signature == [
            (not isinstance(c, FusedMBConvConfig) and c.squeeze_ratio is not None, c.num_layers, c.out_channels)
            for c in configs
        ]:
            return variant
    return None


def count_classes(state_dict: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier in a state dict of any format; 0 where it has none, or another than one layer there."""
    form = detect_format(state_dict)
    name = module_names(form, layout_of(state_dict))[-1]
    found = [t for leaf in ("weight", "bias") if (t := state_dict.get(f"{name}.{leaf}")) is not None and t.dim()]
    return len(found[0]) if found else 0


def has_classifier(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict of any format has tensors in the classifier's place."""
    form = detect_format(state_dict)
    return any(is_classifier(key, form) for key in state_dict)


@dataclass(frozen=True)
class Settings:
    """What a network computes with and a state dict does not hold.

    Attributes:
        bn_eps, bn_momentum: BatchNorm's, as ``torch.nn.BatchNorm2d`` has them.
        padding: ``"symmetric"``, or ``"same"`` for TensorFlow's.
    """

    bn_eps: float
    bn_momentum: float | None
    padding: PaddingMode


def settings_of(model: nn.Module) -> Settings:
    """The settings of a model of ours, torchvision's, timm's or lukemelas's.

    Raises ValueError for a model without BatchNorm and for one whose BatchNorms differ from each other.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = Counter((norm.eps, norm.momentum) for norm in norms)
    if len(found) != 1:
        raise ValueError(f"expected one eps and momentum in all BatchNorms, got {dict(found) or 'no BatchNorm'}")
    (eps, momentum), _ = found.popitem()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Peers name their convolution with TensorFlow's padding Conv2d...Same..., or have torch's "same" where it is that.
    same = any("Same" in type(conv).__name__ or isinstance(conv.padding, str) for conv in convs)
    return Settings(eps, momentum, "same" if same else "symmetric")


def from_peer(peer: nn.Module, verify: bool | Tensor = True) -> EfficientNet:
    """Our network with a peer's weights and settings, in its training or evaluation mode, on its device and dtype.

    Dropout and stochastic depth are the released network's.

    Args:
        peer: an EfficientNet of torchvision, timm or lukemelas. lukemelas fixes its padding at construction from the
            nominal image size; ours is decided by each image, and the two agree on images of the nominal size.
        verify: whether copies of both networks have to agree on a small random batch, or the images [N, C, H, W] to
            compare them on. What no tensor shows is found so: other strides, activations, gates or pooling.

    Raises ValueError for a model that is no released network, or that computes something else than the released network
    with its weights; it names the first block that differs.
    """
    peer = unwrapped(peer)
    state_dict, settings = peer.state_dict(), settings_of(peer)
    variant = guess_variant(state_dict)
    if variant is None:
        raise ValueError(f"expected one of {', '.join(v for v in VARIANTS if 'tf_' not in v)}, got another network")
    state_dict = convert_state_dict(state_dict)
    variant = replace(
        variant, bn_eps=settings.bn_eps, bn_momentum=cast(float, settings.bn_momentum), padding=settings.padding
    )
    stem, classifier = state_dict["features.0.0.weight"], state_dict.get("classifier.1.weight")
    model = build(variant, in_chans=stem.shape[1], num_classes=0 if classifier is None else classifier.shape[0])
    model.to(stem.device, stem.dtype)
    load_checkpoint(model, state_dict)
    if verify is not False:
        _check_agreement(peer, model, None if verify is True else verify)
    return model.train(peer.training)


def _check_agreement(peer: nn.Module, model: EfficientNet, images: Tensor | None) -> None:
    """Raises ValueError where the two compute something else, with the first block of ``peer`` that does."""
    names = _block_names(peer)
    theirs, ours = Observed(peer, names), Observed(model, _block_names(model))
    if images is None:
        # What fixes its padding for one size agrees on that alone.
        nominal = getattr(getattr(peer, "_global_params", None), "image_size", None)
        seen = theirs.run_random(model.in_chans, SIZES if nominal is None else (nominal,))
    else:
        seen = theirs.run(images)
    images, expected, their_inputs = seen
    _, y, our_inputs = ours.run(images)
    # Without a classifier lukemelas's features are [N, C, 1, 1].
    if not agree([t.flatten(1) for t in y], [t.flatten(1) for t in expected]):
        found = first_difference(our_inputs, their_inputs, ["the stem", *names])
        raise ValueError(
            f"{found}: the released network with these weights computes something else than the model, on images of "
            f"shape {tuple(images.shape)}; verify=False gives it unseen"
        )


def _block_names(model: nn.Module) -> list[str]:
    """The blocks of a network that we know, in the order of their calls."""
    return [name for name, m in model.named_modules() if isinstance(m, InvertedResidual) or is_block(type(m))]


def transfer(source: nn.Module, target: nn.Module) -> None:
    """Copies one model's weights and BatchNorm settings into another, each ours or a peer's.

    Raises ValueError, with ``target`` untouched, where the weights do not fit or the padding differs.
    """
    given, present = settings_of(source), settings_of(target)
    if given.padding != present.padding:
        raise ValueError(
            f"expected a target with {given.padding!r} padding, as the source has, got {present.padding!r}"
        )
    load_checkpoint(target, source.state_dict())
    for module in target.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps, module.momentum = given.bn_eps, given.bn_momentum


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]}{more}"


def _misfit(
    form: Format,
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    state_dict: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    shapes = [
        f"{key!r} (expected {tuple(targets[key].shape)}, got {tuple(state_dict[key].shape)})" for key in misshapen
    ]
    findings = []
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        findings += [f"{name} {_first(repr(key) for key in keys)}"] if keys else []
    findings += [f"misshapen {_first(shapes)}"] if shapes else []
    message = f"the state dict ({form}'s format) does not fit the model: {'; '.join(findings)}"
    if (stem := stem_weight(form)) in misshapen and state_dict[stem].dim() == 4:
        given_chans, expected_chans = state_dict[stem].shape[1], targets[stem].shape[1]
        if given_chans != expected_chans:
            message += f"; it is for images of {given_chans} channels, the model (in_chans) of {expected_chans}"
    if all(is_classifier(key, form) for key in (*missing, *unexpected, *misshapen)):
        message += (
            "; only the classifier differs: skip_classifier=True, or a builder's num_classes, keeps the model's own"
        )
    given, expected = guess_variant(state_dict), guess_variant(own)
    if given is not None and given != expected:
        message += f"; it seems to be of {given.name}"
        message += f", and the model is {expected.name}" if expected is not None else ""
    return message
