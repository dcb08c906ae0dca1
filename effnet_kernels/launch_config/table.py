"""The table that overrides the rules: tiles that were measured to be faster on a GPU, by shape bucket.

``python -m effnet_kernels.tune`` writes one. Keys name the GPU's architecture, the kernel, its dtype and its shape,
each size rounded up to a power of two; values are the fields of the configuration that differ from the rule's.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from effnet_kernels.launch_config import Target

Tile = dict[str, int]
Lookup = Callable[[str, Tile], Tile]

Rule = TypeVar("Rule", bound=Callable[..., Any])

# Of the whole process: on a GPU, autograd runs backward in a thread of its own, which has no context variables of ours.
_watchers: list[Lookup] = []


def tuned(kernel: str, dtype: torch.dtype, target: Target, sizes: Mapping[str, int | bool], tile: Tile) -> Tile:
    """``tile``, which the rule has chosen, with the table's fields in it."""
    table = _table()
    if not _watchers and not table:
        return tile
    key = key_of(kernel, dtype, target, sizes)
    tile = {**tile, **table.get(key, {})}
    return _watchers[-1](key, tile) if _watchers else tile


def remembered(rule: Rule) -> Rule:
    """A rule that answers the same question once: eager calls ask it at every launch. What watches is always asked."""
    memory = functools.lru_cache(maxsize=4096)(rule)
    _memories.append(memory)

    @functools.wraps(rule)
    def answer(*arguments: Any) -> Any:
        return rule(*arguments) if _watchers else memory(*arguments)

    return cast(Rule, answer)


_memories: list[Any] = []


def forget() -> None:
    """Reads the table anew at the next question."""
    _table.cache_clear()
    for memory in _memories:
        memory.cache_clear()


def key_of(kernel: str, dtype: torch.dtype, target: Target, sizes: Mapping[str, int | bool]) -> str:
    buckets = "_".join(f"{name}{_bucket(size)}" for name, size in sizes.items())
    return f"{target.backend}{target.architecture}/{kernel}/{str(dtype).removeprefix('torch.')}/{buckets}"


@contextlib.contextmanager
def watching(watcher: Lookup) -> Iterator[None]:
    """Inside the ``with`` block every lookup goes through ``watcher``, which may choose another tile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.pop()


def default_path() -> Path:
    """``EFFNET_KERNELS_TABLE``, or launch_table.json in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EFFNET_KERNELS_TABLE") or cache / "effnet_kernels" / "launch_table.json")


def write(path: Path, entries: Mapping[str, Tile]) -> None:
    """Adds entries to a table, which is created where there is none; those of other GPUs and shapes stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read(path), **entries}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(merged, indent=1, sort_keys=True))
    temporary.replace(path)
    forget()


def read(path: Path) -> dict[str, Tile]:
    """A table; empty where there is no file. Raises ValueError where there is another kind of file."""
    if not path.exists():
        return {}
    try:
        entries: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a launch table in JSON: {error}") from error
    fine = isinstance(entries, dict) and all(
        isinstance(tile, dict) and all(type(value) is int for value in tile.values()) for tile in entries.values()
    )
    if not fine:
        raise ValueError(f"{path}: expected a launch table, an object of objects of integers")
    return entries


@functools.cache
def _table() -> dict[str, Tile]:
    return read(default_path())


def _bucket(size: int | bool) -> int:
    return int(size) if size <= 1 else 1 << (int(size) - 1).bit_length()
