"""State dicts as training scripts leave them: inside of checkpoints, under prefixes."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.models.weights.formats import detect_format

_log = logging.getLogger(__name__)

# Averaged weights first, as timm prefers them.
_AVERAGED = "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"
_ENTRIES = *_AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module"
_PREFIXES = "module.", "model.", "net.", "network.", "backbone.", "encoder.", "base.", "base_model.", "timm_model."


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without the prefix that a wrapper gave to all of its keys.

    The entries that training scripts use (``state_dict``, ``model_state_dict``, ``model``, ``net`` ...) are tried in an
    order in which averaged weights come first, as timm does, and then the checkpoint itself. Prefixes such as
    ``module.`` (DistributedDataParallel) or ``model.`` (Lightning) are left out where all keys have them, and logged;
    ``_orig_mod.`` (torch.compile) is left out wherever it stands.

    Raises TypeError for anything but a mapping; ValueError for an entry that is no dense tensor, for two keys that
    differ in prefixes alone, and for a network under a prefix beside keys of something else.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"expected a state dict, got {type(checkpoint).__name__}")
    state_dict: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, value in (_find(checkpoint) or checkpoint).items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"expected a state dict of tensors, by itself or under one of {', '.join(_ENTRIES)}, "
                f"got {type(value).__name__} under the key {key!r}"
            )
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
            raise ValueError(f"expected a state dict of dense tensors, got a {kind} one under the key {key!r}")
        # torch.optim.swa_utils.AveragedModel counts its updates beside the weights.
        if key.rpartition(".")[2] == "n_averaged":
            continue
        other = sources.setdefault(_bare(key), key)
        if other != key:
            raise ValueError(f"expected one tensor for {_bare(key)!r}, got {other!r} and {key!r}")
        state_dict[key.replace("_orig_mod.", "")] = value
    prefix, state_dict = _split_prefix(state_dict)
    if prefix:
        _log.info("left out %r, which all %d keys of the state dict began with", prefix, len(state_dict))
    if any(key.startswith("embeddings.") for key in state_dict):
        # transformers' network without a classifier lacks the prefix that it has inside of the classifying one.
        state_dict = {f"efficientnet.{key}": value for key, value in state_dict.items()}
    _check_alone(state_dict)
    return state_dict


def _find(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The innermost entry that holds tensors; None where there are none."""
    for entry in _ENTRIES:
        inner = checkpoint.get(entry)
        if isinstance(inner, Mapping) and (found := _find(inner)) is not None:
            return found
    return checkpoint if any(isinstance(value, Tensor) for value in checkpoint.values()) else None


def _split_prefix(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefixes that all keys have, and the state dict without them."""
    left_out = ""
    while prefix := next((p for p in _PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), ""):
        left_out += prefix
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return left_out, state_dict


def _check_alone(state_dict: dict[str, Tensor]) -> None:
    for prefix in _PREFIXES if not _is_network(state_dict) else ():
        inside = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if inside and _is_network(_split_prefix(inside)[1]):
            stranger = next(key for key in state_dict if key not in inside)
            raise ValueError(
                f"expected the keys of a network alone, got {stranger!r} beside {len(inside)} under {prefix!r}: load "
                f"{{key: value for key, value in state_dict.items() if key.startswith({prefix!r})}}"
            )


def _is_network(state_dict: dict[str, Tensor]) -> bool:
    try:
        detect_format(state_dict)
    except ValueError:
        return False
    return True


def _bare(key: str) -> str:
    """A key without any prefix."""
    key = key.replace("_orig_mod.", "")
    while prefix := next((p for p in _PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key
