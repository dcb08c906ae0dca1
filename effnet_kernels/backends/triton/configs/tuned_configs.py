"""Tuned configs: tiles that were measured to be faster on a GPU than the rule's, by shape bucket.

``effnet tune`` writes them to a JSON file, which ``EFFNET_KERNELS_TABLE`` names. Its keys name the
GPU's architecture, the kernel, its dtype and its shape, with each size rounded up to a power of two. Its values are the
fields of a configuration that replace the rule's.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from effnet_kernels.backends.triton.configs import Target

Tile = dict[str, int]
"""The fields of a configuration that a rule chooses, and that tuning may change."""
ChooseTile = Callable[[str, Tile], Tile]
"""From a bucket's key and its tile to the tile that is used."""

Rule = TypeVar("Rule", bound=Callable[..., Any])

# The file names some fields otherwise than the code. Its names do not change, so that files stay valid.
_NAMES_IN_FILE = {
    "gemm": {"block_m": "block_rows", "block_n": "block_columns", "block_k": "block_inner"},
    "weight_gradient": {"block_m": "block_outputs", "block_n": "block_inputs", "block_k": "block_rows"},
    "depthwise": {"block_c": "block_channels"},
    "depthwise_backward": {"block_c": "block_channels"},
}
# For the whole process: on a GPU, autograd runs backward in a thread of its own, which does not see context variables.
_overrides: list[ChooseTile] = []
_cached_rules: list[Any] = []
_cleared = 0


def apply_tuned(kernel: str, dtype: torch.dtype, target: Target, sizes: Mapping[str, int | bool], tile: Tile) -> Tile:
    """The rule's ``tile`` with the fields of the bucket's tuned config, if there is one."""
    configs = _configs()
    if not _overrides and not configs:
        return tile
    key = key_of(kernel, dtype, target, sizes)
    tile = {**tile, **configs.get(key, {})}
    return _overrides[-1](key, tile) if _overrides else tile


def cached_rule(rule: Rule) -> Rule:
    """A rule that keeps its answers, which eager calls need at every launch; inside :func:`override` it keeps none."""
    cached = functools.lru_cache(maxsize=4096)(rule)
    _cached_rules.append(cached)

    @functools.wraps(rule)
    def answer(*arguments: Any) -> Any:
        return rule(*arguments) if _overrides else cached(*arguments)

    return cast(Rule, answer)


def clear_caches() -> None:
    """Forgets the tuned configs and the answers of rules, so that the next launch reads the file again."""
    global _cleared
    _cleared += 1
    _configs.cache_clear()
    for rule in _cached_rules:
        rule.cache_clear()


def generation() -> int:
    """A number that changes where the rules' answers may."""
    return _cleared


def is_overridden() -> bool:
    """Whether :func:`override` is in effect."""
    return bool(_overrides)


def key_of(kernel: str, dtype: torch.dtype, target: Target, sizes: Mapping[str, int | bool]) -> str:
    """The key of a shape bucket, such as ``cuda90/depthwise/float16/samples64_channels32``."""
    buckets = "_".join(f"{name}{_bucket(size)}" for name, size in sizes.items())
    return f"{target.backend}{target.architecture}/{kernel}/{str(dtype).removeprefix('torch.')}/{buckets}"


def kernel_of(key: str) -> str:
    """The kernel that a key names, after its architecture."""
    return key.partition("/")[2].partition("/")[0]


@contextlib.contextmanager
def override(choose: ChooseTile) -> Iterator[None]:
    """Inside the ``with`` block ``choose`` has the last word on every tile."""
    _overrides.append(choose)
    try:
        yield
    finally:
        _overrides.pop()


def default_path() -> Path:
    """``EFFNET_KERNELS_TABLE``, or launch_table.json in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EFFNET_KERNELS_TABLE") or cache / "effnet_kernels" / "launch_table.json")


def write(path: Path, configs: Mapping[str, Tile]) -> None:
    """Adds tuned configs to a file, which is created if it is missing; entries of other GPUs and shapes stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read(path), **configs}
    entries = {key: _renamed(tile, _NAMES_IN_FILE.get(kernel_of(key), {})) for key, tile in merged.items()}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(entries, indent=1, sort_keys=True))
    temporary.replace(path)
    clear_caches()


def read(path: Path) -> dict[str, Tile]:
    """The tuned configs of a file; none if it is missing. Raises ValueError for another kind of file."""
    if not path.exists():
        return {}
    try:
        entries: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected tuned launch configurations in JSON: {error}") from error
    well_formed = isinstance(entries, dict) and all(
        isinstance(tile, dict) and all(type(value) is int for value in tile.values()) for tile in entries.values()
    )
    if not well_formed:
        raise ValueError(f"{path}: expected tuned launch configurations, an object of objects of integers")
    configs = {}
    for key, tile in entries.items():
        names = {in_file: name for name, in_file in _NAMES_IN_FILE.get(kernel_of(key), {}).items()}
        configs[key] = _renamed(tile, names)
    return configs


@functools.cache
def _configs() -> dict[str, Tile]:
    return read(default_path())


def _renamed(tile: Tile, names: Mapping[str, str]) -> Tile:
    return {names.get(name, name): value for name, value in tile.items()}


def _bucket(size: int | bool) -> int:
    return int(size) if size <= 1 else 1 << (int(size) - 1).bit_length()
