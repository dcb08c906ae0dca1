"""Measures launch configurations on this machine's GPU and writes those that are faster than the rule's.

    effnet tune [--model efficientnet_b0] [--batch 64] [--dtype fp16] [--minutes 5] [--output FILE] [--json FILE]

The launches of a training step and of inference are captured, first as the rules configure them, then with each shape
bucket's next candidate, and so on. The kernels of a few rounds are compiled ahead in parallel; then every distinct
launch is timed alone, on random data and with a cold cache, the buckets that take most of the step first. What a tile
does to the time of other kernels, which sum the partial results that it leaves, is not seen. What was found is written
after each bucket's launches, so that a run that is cut off keeps it. The tuned configs override the rules from the
next process on; ``effnet_kernels.backends.triton.configs.tuned_configs`` says where they are looked for.
"""

import collections
import contextlib
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from effnet_kernels import create_model
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.configs import Target, target_of, tuned_configs, use_target
from effnet_kernels.backends.triton.configs.tuned_configs import Tile, kernel_of
from effnet_kernels.tools.timing import distinct_launches, measure, replay, synchronize, write_results
from effnet_kernels.tools.warmup import launches_of_step

if TYPE_CHECKING:
    from effnet_kernels.backends.triton.launch import Launch

# The values that a candidate may have in place of the rule's, by kernel and field.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "gemm": {
        "block_m": (32, 64, 128),
        "block_n": (16, 32, 64, 128),
        "block_k": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "weight_gradient": {"block_n": (32, 64, 128), "block_k": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "depthwise": {"width": (4, 7, 8), "strips": (4, 8), "num_warps": (2, 4)},
    "depthwise_backward": {"width": (2, 4, 7), "strips": (4, 8), "num_warps": (2, 4)},
}
# The kernels whose launches ask for a tile, once each.
TUNED = (
    *("pointwise_conv_kernel", "pointwise_conv_backward_data_kernel", "pointwise_conv_backward_weight_kernel"),
    *("depthwise_conv_kernel", "depthwise_conv_backward_kernel"),
)
# A candidate wins if it is this much faster, so that noise does not become a tuned config.
GAIN = 1.03
# Starting a process takes as long as compiling a few kernels, so that each gets several.
_BINARIES_A_PROCESS = 8


def candidates(kernel: str, tile: Tile, fields: int = 2) -> list[Tile]:
    """The tiles that differ from the rule's in at most ``fields`` fields, each once, those with one change first."""
    choices = {name: values for name, values in CHOICES[kernel].items() if name in tile}
    found = []
    for number in range(1, fields + 1):
        for names in itertools.combinations(choices, number):
            others = ([value for value in choices[name] if value != tile[name]] for name in names)
            found += [{**tile, **dict(zip(names, values, strict=True))} for values in itertools.product(*others)]
    return found


class Trial(NamedTuple):
    """The launches of a shape bucket in the two steps with one of its candidates, and how often each is made."""

    key: str
    candidate: int
    launches: "list[tuple[Launch, int]]"


class Tuning:
    """The candidates of each shape bucket, the rule's tile first, and the milliseconds of the bucket's launches."""

    def __init__(self, fields: int = 2) -> None:
        self.fields = fields
        self.candidates: dict[str, list[Tile]] = {}
        self.times: dict[str, dict[int, float]] = collections.defaultdict(dict)
        self.rejected: dict[str, dict[int, str]] = collections.defaultdict(dict)

    def rounds(self, capture: "Callable[[], list[Launch]]") -> Iterator[list[Trial]]:
        """The trials of the rules, then those of each bucket's next candidate; ``capture`` captures both steps."""
        index = 0
        while index == 0 or index < max(map(len, self.candidates.values()), default=0):
            yield self._trials(index, capture)
            index += 1

    def _trials(self, index: int, capture: "Callable[[], list[Launch]]") -> list[Trial]:
        asked: list[str] = []

        def choose(key: str, tile: Tile) -> Tile:
            if key not in self.candidates:
                self.candidates[key] = [tile, *candidates(kernel_of(key), tile, self.fields)]
            asked.append(key)
            known = self.candidates[key]
            # With index 0, every shape of the bucket gets its own rule's tile.
            return known[index] if 0 < index < len(known) else tile

        with tuned_configs.override(choose):
            launches = [launch for launch in capture() if launch.kernel.__name__ in TUNED]
        found = collections.defaultdict(list)
        for key, launch in zip(asked, launches, strict=True):
            found[key].append(launch)
        return [
            Trial(key, index, distinct_launches(launches))
            for key, launches in found.items()
            if index < len(self.candidates[key])
        ]

    def time(self, trial: Trial, repeats: int) -> None:
        """Times a trial, or rejects its candidate where that does not compile or does not run."""
        try:
            milliseconds = 0.0
            for launch, count in trial.launches:
                call = replay(launch)
                # The first call loads the kernel.
                call()
                milliseconds += count * statistics.median(measure(call) for _ in range(repeats))
        except Exception as error:
            # Raises where the GPU itself failed, after which nothing can be measured.
            synchronize()
            self.rejected[trial.key][trial.candidate] = f"{type(error).__name__}: {error}"[:300]
        else:
            self.times[trial.key][trial.candidate] = milliseconds

    def share(self, trial: Trial) -> float:
        """The milliseconds of a trial's bucket in the two steps by the rule."""
        return self.times[trial.key].get(0, 0.0)

    def winners(self) -> dict[str, Tile]:
        """The tiles that beat the rule's by :data:`GAIN`."""
        found: dict[str, Tile] = {}
        for key, times in self.times.items():
            if 0 not in times:
                continue
            best = min(times, key=lambda index: times[index])
            if times[best] * GAIN < times[0]:
                found[key] = self.candidates[key][best]
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "winners": self.winners(),
            "milliseconds": {
                key: [{"tile": self.candidates[key][index], "ms": ms} for index, ms in times.items()]
                for key, times in self.times.items()
            },
            "rejected": {
                key: [{"tile": self.candidates[key][index], "error": error} for index, error in errors.items()]
                for key, errors in self.rejected.items()
            },
        }


def tune(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    repeats: int = 5,
    fields: int = 2,
    minutes: float | None = None,
    keep: Callable[[Tuning], None] = lambda tuning: None,
) -> dict[str, Tile]:
    """The winners for a step of ``model`` on inputs of ``shape`` under autocast in ``dtype``, in both modes.

    Args:
        repeats: how often each launch is timed; the median counts.
        fields: in how many fields a candidate may differ from the rule's tile.
        minutes: after which no more is timed; a batch of kernels that is being compiled is still finished.
        keep: called with what is known after each bucket's launches.

    Raises RuntimeError, after all else, where launches fail as the rules configure them.
    """
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    target = target_of(next(model.parameters()))
    tuning = Tuning(fields)
    with use_target(target):
        for trials in _batches(tuning.rounds(functools.partial(_launches, model, shape, dtype))):
            if time.monotonic() >= end:
                break
            _compile(trials, target)
            for trial in sorted(trials, key=tuning.share, reverse=True):
                if time.monotonic() >= end:
                    break
                tuning.time(trial, repeats)
                keep(tuning)
    broken = {key: errors[0] for key, errors in tuning.rejected.items() if 0 in errors}
    if broken:
        raise RuntimeError(f"launches fail as the rules configure them: {broken}")
    return tuning.winners()


def _launches(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype) -> "list[Launch]":
    """The launches of a training step and of inference."""
    from effnet_kernels.backends.triton.launch import capture_launches, simulated

    autocast = None if dtype == torch.float32 else dtype
    # The simulator's mode would take the meta device for the GPU's.
    own_devices = torch.overrides._pop_mode_temporarily() if simulated() else contextlib.nullcontext()
    # Around a capture no GPU is needed, and the backend is the same whichever the environment names.
    with own_devices, capture_launches(), select.use_backend("triton"):
        return [launch for train in (True, False) for launch in launches_of_step(model, shape, train, autocast)]


def _batches(rounds: Iterable[list[Trial]]) -> Iterator[list[Trial]]:
    """The rules' round, then the others, as many together as give each compiling process enough to do."""
    from effnet_kernels.backends.triton.compilation import binary_of

    pending: list[Trial] = []
    binaries: set[object] = set()
    for index, trials in enumerate(rounds):
        pending += trials
        binaries.update(binary_of(launch) for trial in trials for launch, _ in trial.launches)
        if index == 0 or len(binaries) >= _BINARIES_A_PROCESS * (os.cpu_count() or 1):
            yield pending
            pending, binaries = [], set()
    if pending:
        yield pending


def _compile(trials: Iterable[Trial], target: Target) -> None:
    """Compiles the kernels of trials in parallel."""
    from effnet_kernels.backends.triton.compilation import compile_in_parallel, distinct, gpu_target
    from effnet_kernels.backends.triton.launch import simulated

    if simulated():
        return
    binaries = distinct(launch for trial in trials for launch, _ in trial.launches)
    # Those that do not compile are named in the error; their launches fail again and reject the candidate.
    with contextlib.suppress(RuntimeError):
        compile_in_parallel(binaries, gpu_target(target.architecture))


def tune_and_write(
    model: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    path: Path | None,
    fields: int = 2,
    minutes: float | None = None,
    report: Path | None = None,
) -> tuple[int, Path]:
    """Writes the winners of :func:`tune` as they are found, and all times as JSON to ``report``.

    Returns how many winners there are, and where. Raises BackendError without a GPU.
    """
    reason = select.available()["triton"]
    if reason is not None:
        raise select.BackendError(f"there is nothing to tune: {reason}")
    path = tuned_configs.default_path() if path is None else path
    written: dict[str, Tile] = {}

    def keep(tuning: Tuning) -> None:
        nonlocal written
        winners = tuning.winners()
        if winners != written:
            tuned_configs.write(path, winners)
            written = winners
        if report is not None:
            write_results(report, tuning.as_json())

    winners = tune(create_model(model).cuda(), shape, dtype, fields=fields, minutes=minutes, keep=keep)
    tuned_configs.write(path, winners)
    return len(winners), path
