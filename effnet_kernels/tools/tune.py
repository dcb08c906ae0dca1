"""Measures launch configurations on this machine's GPU and writes those that are faster than the rule's.

    effnet tune [--model efficientnet_b0] [--batch 64] [--dtype fp16] [--output FILE]

Whole steps run, training and inference, and every launch is timed within its step, with the cache as the launch before
it leaves it. From step to step each shape bucket takes its next candidate. The tuned configs override the rules from
the next process on; ``effnet_kernels.backends.triton.configs.tuned_configs`` says where they are looked for.
"""

import collections
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from effnet_kernels import create_model
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.configs import tuned_configs
from effnet_kernels.backends.triton.configs.tuned_configs import Tile, kernel_of
from effnet_kernels.tools.timing import measure

# The values that a candidate may have in place of the rule's, by kernel and field.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "gemm": {
        "block_m": (32, 64, 128),
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "weight_gradient": {"block_n": (64, 128), "block_k": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "depthwise": {"width": (4, 7, 8), "strips": (4, 8), "num_warps": (2, 4)},
    "depthwise_backward": {"width": (2, 4, 7), "strips": (4, 8), "num_warps": (2, 4)},
}
# A candidate wins if it is this much faster, so that noise does not become a tuned config.
GAIN = 1.03


class Tuning:
    """The candidates of each shape bucket, and the times of their launches."""

    def __init__(self) -> None:
        self.candidates: dict[str, list[Tile]] = {}
        self.times: dict[str, dict[int, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        self.rejected: set[tuple[str, int]] = set()
        self.step = 0
        self._asked: str | None = None

    def choose(self, key: str, tile: Tile) -> Tile:
        """The candidate of this step, for :func:`effnet_kernels.backends.triton.configs.tuned_configs.override`."""
        if key not in self.candidates:
            self.candidates[key] = [tile, *candidates(kernel_of(key), tile)]
        self._asked = key
        return self.candidates[key][self._index(key)]

    def _index(self, key: str) -> int:
        """The index of this step's candidate, or the rule's tile, 0, if that candidate has been rejected."""
        index = self.step % len(self.candidates[key])
        return 0 if (key, index) in self.rejected else index

    def time(self, kernel: object, launch: Callable[[], None]) -> None:
        """Times a launch whose configuration has just been asked for."""
        key, self._asked = self._asked, None
        if key is None:
            launch()
            return
        index = self._index(key)
        try:
            self.times[key][index].append(measure(launch))
        except Exception as error:  # a tile that does not compile or does not fit is rejected
            if index == 0:
                raise
            self.rejected.add((key, index))
            self.times[key].pop(index, None)
            raise Rejected(key) from error

    def winners(self) -> dict[str, Tile]:
        """The tiles that beat the rule's by :data:`GAIN`."""
        found: dict[str, Tile] = {}
        for key, times in self.times.items():
            if 0 not in times:
                continue
            best = min(times, key=lambda index: statistics.median(times[index]))
            if statistics.median(times[best]) * GAIN < statistics.median(times[0]):
                found[key] = self.candidates[key][best]
        return found


class Rejected(Exception):
    """A candidate could not be launched, which ends the step. The next step goes without it."""


def candidates(kernel: str, tile: Tile) -> Iterator[Tile]:
    """Tiles that differ from the rule's in one or two fields."""
    choices = {name: values for name, values in CHOICES[kernel].items() if name in tile}
    for first, second in itertools.combinations_with_replacement(choices, 2):
        for pair in itertools.product(choices[first], choices[second]):
            changed = dict(zip((first, second), pair, strict=True))
            if all(tile[name] != value for name, value in changed.items()):
                yield {**tile, **changed}


def tune(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int = 3) -> dict[str, Tile]:
    """The winners for a step of ``model`` on inputs of ``shape`` under autocast in ``dtype``, in both modes."""
    from effnet_kernels.backends.triton.launch import timed_by

    tuning = Tuning()
    x = torch.randn(*shape, device="cuda").contiguous(memory_format=torch.channels_last)
    with select.use_backend("triton"), tuned_configs.override(tuning.choose), timed_by(tuning.time):
        steps = 1
        while tuning.step < steps:
            for training in (True, False) * repeats:
                while True:
                    try:
                        _run(model, x, dtype, training)
                        break
                    except Rejected:
                        model.zero_grad()
            tuning.step += 1
            steps = max(map(len, tuning.candidates.values()))
    return tuning.winners()


def _run(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, training: bool) -> None:
    model.train(training).zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(training):
        y = model(x)
    if training:
        y.float().square().mean().backward()


def tune_and_write(
    model: str, shape: tuple[int, int, int, int], dtype: torch.dtype, path: Path | None
) -> tuple[int, Path]:
    """Writes the winners of :func:`tune`; returns how many there are, and where. Raises BackendError without a GPU."""
    reason = select.available()["triton"]
    if reason is not None:
        raise select.BackendError(f"there is nothing to tune: {reason}")
    path = tuned_configs.default_path() if path is None else path
    winners = tune(create_model(model).cuda(), shape, dtype)
    tuned_configs.write(path, winners)
    return len(winners), path
