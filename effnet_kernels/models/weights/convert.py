"""State dicts of EfficientNets in the formats of torchvision, timm, lukemelas and transformers, converted.

BatchNorm's settings and the padding are in neither keys nor shapes: ``effnet_kernels.interop.conversion`` carries them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effnet_kernels.models.variants import VARIANTS, Variant
from effnet_kernels.models.weights.formats import (
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
from effnet_kernels.models.weights.wrappers import unwrap
from effnet_kernels.modules import FusedMBConvConfig


def convert_state_dict(
    state_dict: Mapping[str, Any], to: Format = "torchvision", *, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """The same tensors under the keys of another format.

    Padding, BatchNorm eps and momentum are not part of a state dict: see :func:`effnet_kernels.from_peer`.

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
    """Loads a state dict of any format, wrapped and prefixed or not, into a model of ours or of another package.

    A model without classifier or without head takes the tensors that it has a place for. BatchNorm counters that old
    checkpoints lack stay as they are.

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
