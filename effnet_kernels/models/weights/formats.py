"""The names that torchvision, timm, lukemelas and transformers give to the modules of an EfficientNet.

A state dict is read as a layout: the kinds of the blocks, stage by stage. A format is the names that it gives to the
modules of a layout. Ours is torchvision's; timm's is that of `timm.models.efficientnet`, lukemelas's that of the
packages `efficientnet_pytorch` and `efficientnet_lite_pytorch`, and transformers' that of Hugging Face's
`EfficientNetForImageClassification`.
"""

import re
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

Format = Literal["torchvision", "timm", "lukemelas", "transformers"]
FORMATS: tuple[Format, ...] = ("torchvision", "timm", "lukemelas", "transformers")
# Formats of networks that are TensorFlow's, that number their blocks across stages, and that have no Fused-MBConv.
NUMBERED: tuple[Format, ...] = ("lukemelas", "transformers")

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
_NUMBERED_CONVS = {
    "lukemelas": {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    },
    "transformers": {
        "expand": ("expansion.expand_conv", "expansion.expand_bn"),
        "depthwise": ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
        "project": ("projection.project_conv", "projection.project_bn"),
    },
}
_SQUEEZE_EXCITE = {
    "timm": ["se.conv_reduce", "se.conv_expand"],
    "lukemelas": ["_se_reduce", "_se_expand"],
    "transformers": ["squeeze_excite.reduce", "squeeze_excite.expand"],
}
# A block's name, and the name of a part inside of it.
_BLOCK = {
    "torchvision": re.compile(r"(features\.\d+\.\d+)\.(block\..+)"),
    "timm": re.compile(r"(blocks\.\d+\.\d+)\.(.+)"),
    "lukemelas": re.compile(r"(_blocks\.\d+)\.(.+)"),
    "transformers": re.compile(r"(efficientnet\.encoder\.blocks\.\d+)\.(.+)"),
}
# The stem's convolution and norm, the head's, the classifier.
_ENDS: dict[Format, tuple[str, str, str, str, str]] = {
    "torchvision": ("features.0.0", "features.0.1", "features.{}.0", "features.{}.1", "classifier.1"),
    "timm": ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    "lukemelas": ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"),
    "transformers": (
        "efficientnet.embeddings.convolution",
        "efficientnet.embeddings.batchnorm",
        "efficientnet.encoder.top_conv",
        "efficientnet.encoder.top_bn",
        "classifier",
    ),
}


class BlockKind(NamedTuple):
    """``separable`` (no expansion), ``inverted``, ``fused`` or ``dense`` (fused, no expansion); with or without SE."""

    name: str
    squeezes: bool = False


Layout = list[list[BlockKind]]
KINDS = [BlockKind(name, squeezes) for name in ("separable", "inverted") for squeezes in (True, False)]
KINDS += [BlockKind("dense"), BlockKind("fused")]


def detect_format(state_dict: Mapping[str, Any]) -> Format:
    """The format that the keys are in; raises ValueError, with the first of them, for an unknown one."""
    for form, prefixes in (
        ("torchvision", ("features.",)),
        ("timm", ("conv_stem.", "blocks.")),
        ("lukemelas", ("_conv_stem.", "_blocks.")),
        ("transformers", ("efficientnet.embeddings.", "efficientnet.encoder.")),
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
        block = _BLOCK[form].match(key)
        if block is not None:
            blocks.setdefault(block[1], set()).add(block[2].rpartition(".")[0])
    kinds = []
    for prefix in sorted(blocks, key=lambda prefix: [int(number) for number in re.findall(r"\d+", prefix)]):
        kind = _kind_of(form, prefix, blocks[prefix], state_dict)
        # Where the names have no stages, successive blocks with a kind and shapes in common are a stage.
        shapes = _stage_shapes(form, prefix, state_dict) if form in NUMBERED else None
        stage = prefix.split(".")[1] if shapes is None else (kind, *shapes)
        kinds.append((stage, kind))
    return [[kind for _, kind in stage] for _, stage in groupby(kinds, key=itemgetter(0))]


def _stage_shapes(form: Format, prefix: str, state_dict: Mapping[str, Tensor]) -> list[int | None]:
    """Output channels and kernel size of a numbered block, which the blocks of a stage share."""
    names = _NUMBERED_CONVS[form]
    project = state_dict.get(f"{prefix}.{names['project'][0]}.weight")
    depthwise = state_dict.get(f"{prefix}.{names['depthwise'][0]}.weight")
    shapes = ((project, 0), (depthwise, -1))
    return [None if weight is None or weight.dim() == 0 else weight.shape[side] for weight, side in shapes]


def _kind_of(form: Format, prefix: str, modules: set[str], state_dict: Mapping[str, Tensor]) -> BlockKind:
    best, best_distance = KINDS[0], len(modules) + 1
    for kind in KINDS:
        if form in NUMBERED and kind.name in ("dense", "fused"):
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
    """A format's names for the modules of a block, in the order of :func:`roles_of`."""
    if form in NUMBERED and kind.name in ("dense", "fused"):
        raise ValueError(f"expected a network without Fused-MBConv blocks: {form}'s format has no names for them")
    names: list[str] = []
    for index, conv in enumerate(_CONVS[kind.name]):
        last = conv == "project" and kind.squeezes
        if form == "torchvision":
            names += [f"block.{index}.fc1", f"block.{index}.fc2"] if last else []
            names += [f"block.{index + last}.0", f"block.{index + last}.1"]
            continue
        names += _SQUEEZE_EXCITE[form] if last else []
        if form == "timm":
            names += [_TIMM_CONVS[kind.name][index], f"bn{index + 1}"]
        else:
            names += _NUMBERED_CONVS[form][conv]
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
                "transformers": f"efficientnet.encoder.blocks.{index}",
            }[form]
            names += [f"{prefix}.{name}" for name in block_names(form, kind)]
            index += 1
    return [*names, head_conv, head_bn, classifier]


def stem_weight(form: Format) -> str:
    """The key of the first convolution's weight."""
    return f"{_ENDS[form][0]}.weight"


def is_classifier(key: str, form: Format) -> bool:
    """Whether a key belongs to the classifier, or to a module that was put in its place."""
    return key.split(".")[0] == _ENDS[form][-1].split(".")[0]


def is_beyond(key: str, form: Format, layout: Layout) -> bool:
    """Whether a key belongs to a part behind these stages: further stages, the head, the classifier."""
    if is_classifier(key, form):
        return True
    if form == "torchvision":
        part, limit = "features", len(layout)
    elif form == "timm":
        part, limit = "blocks", len(layout) - 1
    else:
        part = "_blocks" if form == "lukemelas" else "efficientnet.encoder.blocks"
        limit = sum(len(stage) for stage in layout) - 1
    number = re.match(rf"{re.escape(part)}\.(\d+)\.", key)
    if number is not None:
        return int(number[1]) > limit
    return key.startswith(tuple(f"{name}." for name in _ENDS[form][2:]))
