"""The names that torchvision, timm and lukemelas give to the modules of an EfficientNet.

A state dict is read as a layout: the kinds of the blocks, stage by stage. A format is the names that it gives to the
modules of a layout. Ours is torchvision's; timm's is that of `timm.models.efficientnet`, lukemelas's that of the
packages `efficientnet_pytorch` and `efficientnet_lite_pytorch`.
"""

from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

Format = Literal["torchvision", "timm", "lukemelas"]
FORMATS: tuple[Format, ...] = ("torchvision", "timm", "lukemelas")

# The convolutions of a block, by its kind, in the order in which they run.
_CONVS = {
    "separable": ("depthwise", "project"),
    "inverted": ("expand", "depthwise", "project"),
    "dense": ("dense",),
    "fused": ("dense", "project"),
}
_TIMM_CONVS = {
    "separable": ("conv_dw", "conv_pw"),
    "inverted": ("conv_pw", "conv_dw", "conv_pwl"),
    "dense": ("conv",),
    "fused": ("conv_exp", "conv_pwl"),
}
_LUKEMELAS_CONVS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_ENDS: dict[Format, tuple[str, str, str, str, str]] = {
    "torchvision": ("features.0.0", "features.0.1", "features.{}.0", "features.{}.1", "classifier.1"),
    "timm": ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    "lukemelas": ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"),
}


class BlockKind(NamedTuple):
    """``separable`` (no expansion), ``inverted``, ``fused`` or ``dense`` (fused, no expansion); with or without SE."""

    name: str
    squeezes: bool = False


Layout = list[list[BlockKind]]
KINDS = [BlockKind(name, squeezes) for name in ("separable", "inverted") for squeezes in (True, False)]
KINDS += [BlockKind("dense"), BlockKind("fused")]


def detect_format(state_dict: Mapping[str, Any]) -> Format:
    """Whose names the keys are; raises ValueError, with the first of them, where they are nobody's."""
    for form, prefixes in (
        ("torchvision", ("features.",)),
        ("timm", ("conv_stem.", "blocks.")),
        ("lukemelas", ("_conv_stem.", "_blocks.")),
    ):
        if any(key.startswith(prefixes) for key in state_dict):
            return cast(Format, form)
    keys = ", ".join(repr(key) for key in list(state_dict)[:3]) or "none at all"
    raise ValueError(f"expected the state dict of an EfficientNet ({', '.join(FORMATS)}), got the keys {keys}")


def layout_of(state_dict: Mapping[str, Tensor]) -> Layout:
    """The kinds of the blocks, stage by stage; raises ValueError for keys of no known format."""
    form = detect_format(state_dict)
    blocks: dict[str, set[str]] = {}
    for key in state_dict:
        parts = key.split(".")
        in_block = parts[3:4] == ["block"] if form == "torchvision" else parts[0] in ("blocks", "_blocks")
        cut = 2 if form == "lukemelas" else 3
        if in_block and all(part.isdigit() for part in parts[1:cut]):
            blocks.setdefault(".".join(parts[:cut]), set()).add(".".join(parts[cut:-1]))
    kinds = []
    for prefix in sorted(blocks, key=lambda prefix: [int(part) for part in prefix.split(".")[1:]]):
        kind = _kind_of(form, prefix, blocks[prefix], state_dict)
        # lukemelas numbers the blocks alone: successive ones with a kind and shapes in common are a stage.
        stage = (kind, *_stage_shapes(prefix, state_dict)) if form == "lukemelas" else prefix.split(".")[1]
        kinds.append((stage, kind))
    return [[kind for _, kind in stage] for _, stage in groupby(kinds, key=itemgetter(0))]


def _stage_shapes(prefix: str, state_dict: Mapping[str, Tensor]) -> list[int | None]:
    """Output channels and kernel size of a lukemelas block, which the blocks of a stage share."""
    project = state_dict.get(f"{prefix}._project_conv.weight")
    depthwise = state_dict.get(f"{prefix}._depthwise_conv.weight")
    return [None if project is None else project.shape[0], None if depthwise is None else depthwise.shape[-1]]


def _kind_of(form: Format, prefix: str, modules: set[str], state_dict: Mapping[str, Tensor]) -> BlockKind:
    best, best_distance = KINDS[0], len(modules) + 1
    for kind in KINDS:
        if form == "lukemelas" and kind.name in ("dense", "fused"):
            continue
        names = block_names(form, kind)
        # torchvision numbers the convolutions; only a depthwise kernel, with one input channel, tells them apart.
        first = state_dict.get(f"{prefix}.{names[0]}.weight")
        if form == "torchvision" and kind.name != "inverted" and first is not None:
            is_depthwise = first.dim() == 4 and first.shape[1] == 1
            if is_depthwise != (kind.name == "separable"):
                continue
        # The nearest kind, not only an equal one, so that a damaged block is reported by its missing keys.
        distance = len(modules.symmetric_difference(names))
        if distance < best_distance:
            best, best_distance = kind, distance
    return best


def roles_of(kind: BlockKind) -> list[str]:
    """The modules of a block in the order of the state dict: ``conv`` and ``bn`` of each convolution, and SE's two."""
    roles = []
    for conv in _CONVS[kind.name]:
        if conv == "project" and kind.squeezes:
            roles += ["reduce", "excite"]
        roles += [f"{conv}.conv", f"{conv}.bn"]
    return roles


def block_names(form: Format, kind: BlockKind) -> list[str]:
    """A format's names for the modules of a block, in the order of :func:`_roles`."""
    names: list[str] = []
    for index, conv in enumerate(_CONVS[kind.name]):
        last = conv == "project" and kind.squeezes
        if form == "torchvision":
            names += [f"block.{index}.fc1", f"block.{index}.fc2"] if last else []
            names += [f"block.{index + last}.0", f"block.{index + last}.1"]
        elif form == "timm":
            names += ["se.conv_reduce", "se.conv_expand"] if last else []
            names += [_TIMM_CONVS[kind.name][index], f"bn{index + 1}"]
        elif conv in _LUKEMELAS_CONVS:
            names += ["_se_reduce", "_se_expand"] if last else []
            names += _LUKEMELAS_CONVS[conv]
        else:
            raise ValueError("expected a network without Fused-MBConv blocks: lukemelas's format has no names for them")
    return names


def module_names(form: Format, layout: Layout) -> list[str]:
    """A format's names for all modules with tensors, in the order of the network: stem, blocks, head, classifier."""
    stem_conv, stem_bn, head_conv, head_bn, classifier = (name.format(len(layout) + 1) for name in _ENDS[form])
    names, index = [stem_conv, stem_bn], 0
    for stage, kinds in enumerate(layout):
        for block, kind in enumerate(kinds):
            prefix = {
                "torchvision": f"features.{stage + 1}.{block}",
                "timm": f"blocks.{stage}.{block}",
                "lukemelas": f"_blocks.{index}",
            }[form]
            names += [f"{prefix}.{name}" for name in block_names(form, kind)]
            index += 1
    return [*names, head_conv, head_bn, classifier]


def is_classifier(key: str, form: Format) -> bool:
    return key.startswith(f"{_ENDS[form][-1]}.")


def is_beyond(key: str, form: Format, layout: Layout) -> bool:
    """Whether a key belongs to what comes after these stages: further stages, the head, the classifier."""
    if form == "torchvision":
        part, limit = "features", len(layout)
    elif form == "timm":
        part, limit = "blocks", len(layout) - 1
    else:
        part, limit = "_blocks", sum(len(stage) for stage in layout) - 1
    first, *rest = key.split(".")
    if first == part:
        return rest[0].isdigit() and int(rest[0]) > limit
    return key.startswith(tuple(f"{name}." for name in _ENDS[form][2:]))
