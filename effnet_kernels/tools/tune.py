"""Measures launch configurations on this machine's GPU and writes those that are faster than the rule's.

    python -m effnet_kernels.tools.tune [--model efficientnet_b0] [--batch 64] [--dtype fp16] [--output FILE]

Whole steps run, training and inference, and every launch in them is timed where it is, with its neighbours' cache. From
step to step each shape bucket takes its next candidate. The table that comes out overrides the rules from the next
process on (``effnet_kernels.launch_config.table`` says where it is looked for).
"""

import argparse
import collections
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from effnet_kernels import create_model, dispatch
from effnet_kernels.launch_config import table
from effnet_kernels.launch_config.table import Tile
from effnet_kernels.tools.timing import measure

# What a candidate may change about the rule's tile, by kernel.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "gemm": {
        "block_rows": (32, 64, 128),
        "block_columns": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "weight_gradient": {"block_inputs": (64, 128), "block_rows": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "depthwise": {"width": (4, 7, 8), "strips": (4, 8), "num_warps": (2, 4)},
    "depthwise_backward": {"width": (2, 4, 7), "strips": (4, 8), "num_warps": (2, 4)},
}
# A candidate is taken if it is this much faster, so that noise does not fill the table.
GAIN = 1.03


class Tuning:
    """Which candidate each bucket is at, and how long its launches took."""

    def __init__(self) -> None:
        self.candidates: dict[str, list[Tile]] = {}
        self.times: dict[str, dict[int, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        self.rejected: set[tuple[str, int]] = set()
        self.step = 0
        self._asked: str | None = None

    def choose(self, key: str, tile: Tile) -> Tile:
        """The candidate of this step, for :func:`effnet_kernels.launch_config.table.watching`."""
        if key not in self.candidates:
            self.candidates[key] = [tile, *candidates(key.split("/")[1], tile)]
        self._asked = key
        return self.candidates[key][self._index(key)]

    def _index(self, key: str) -> int:
        """The candidate of this step, or the rule's tile where that one has been rejected."""
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
        except Exception as error:  # what does not compile or does not fit is no candidate
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
    """A candidate that cannot be launched. The step is over; the next one goes without it."""


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
    from effnet_kernels.triton.launch import timed_by

    tuning = Tuning()
    x = torch.randn(*shape, device="cuda").contiguous(memory_format=torch.channels_last)
    with dispatch.use_backend("triton"), table.watching(tuning.choose), timed_by(tuning.time):
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effnet_kernels.tools.tune", description=(__doc__ or "").splitlines()[0]
    )
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--dtype", choices=dtypes, default="fp16")
    parser.add_argument("--output", type=Path, default=table.default_path())
    options = parser.parse_args(argv)
    reason = dispatch.available()["triton"]
    if reason is not None:
        print(f"there is nothing to tune: {reason}", file=sys.stderr)
        return 2
    shape = (options.batch, 3, options.resolution, options.resolution)
    winners = tune(create_model(options.model).cuda(), shape, dtypes[options.dtype])
    table.write(options.output, winners)
    print(f"{len(winners)} entries in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
