"""The tuner without a GPU: its candidates, its budget, and what it keeps; times come from a function."""

import collections
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effnet_kernels import EfficientNet
from effnet_kernels.backends import triton

if triton.unavailable_reason() is not None:
    pytest.skip(f"{triton.unavailable_reason()}", allow_module_level=True)

from effnet_kernels.backends.triton.configs import tuned_configs
from effnet_kernels.backends.triton.launch import Launch
from effnet_kernels.modules import MBConvConfig
from effnet_kernels.tools import timing, tune
from effnet_kernels.tools.cli import main

SHAPE = (2, 3, 32, 32)
TILES = {
    "gemm": {"block_m": 128, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2},
    "weight_gradient": {"block_m": 64, "block_n": 128, "block_k": 32, "num_warps": 4, "num_stages": 2},
    "depthwise": {"width": 7, "strips": 8, "block_c": 32, "num_warps": 4},
    "depthwise_backward": {"width": 2, "strips": 8, "block_c": 32, "num_warps": 4},
}


def network() -> EfficientNet:
    return EfficientNet([MBConvConfig(2, 3, 2, 8, 16, 2)], 0.0, num_classes=3)


@pytest.mark.parametrize(("cuda", "hip"), [("13.0", None), (None, "7.1")])
def test_the_gpu_is_timed_by_its_own_clock(cuda: str | None, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AMD GPU too, whose torch has no version of CUDA."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 7.0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(timing, "_simulated", lambda: False)
    monkeypatch.setattr(timing, "_overwrite_cache", lambda: None)
    assert timing.measure(lambda: None) == 7.0


class Gpu:
    """Takes the places of the compiler and of the clock; a launch takes what ``milliseconds`` says."""

    def __init__(self) -> None:
        self.milliseconds: Callable[[Launch], float] = lambda launch: 1.0
        self.timed: list[Launch] = []
        self.compiled: list[int] = []
        self.now = 0.0

    def measure(self, call: Callable[[], Launch]) -> float:
        launch = call()
        self.timed.append(launch)
        self.now += 1.0
        return self.milliseconds(launch)

    def compile(self, binaries: list[object], target: object) -> None:
        self.compiled.append(len(binaries))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    stub = Gpu()
    monkeypatch.setattr(tune, "replay", lambda launch: lambda: launch)
    monkeypatch.setattr(tune, "measure", stub.measure)
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: stub.now))
    monkeypatch.setattr("effnet_kernels.backends.triton.compilation.compile_in_parallel", stub.compile)
    monkeypatch.setenv("EFFNET_KERNELS_TABLE", str(tmp_path / "table.json"))
    tuned_configs.clear_caches()
    yield stub
    monkeypatch.undo()
    tuned_configs.clear_caches()


@pytest.fixture
def command(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``effnet tune`` with a small network."""
    monkeypatch.setattr(tune.select, "available", lambda: dict.fromkeys(tune.select.BACKENDS))
    monkeypatch.setattr(tune, "create_model", lambda name: network())
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    size = ["--batch", "2", "--resolution", "32", "--fields", "1"]
    return lambda *arguments: main(["tune", *size, "--json", str(tmp_path / "times.json"), *arguments])


@pytest.mark.parametrize("kernel", tune.CHOICES)
def test_every_candidate_comes_once_and_differs_from_the_rules_tile(kernel: str) -> None:
    tile, choices = TILES[kernel], tune.CHOICES[kernel]
    found = [tuple(candidate.items()) for candidate in tune.candidates(kernel, tile)]
    assert len(set(found)) == len(found)
    every = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    changes = [sum(tile[name] != value for name, value in candidate.items()) for candidate in every]
    # The rule's own value need not be among the choices; it is in a candidate that does not change the field.
    assert len(found) >= sum(number in (1, 2) for number in changes)
    numbers = [sum(tile[name] != value for name, value in candidate) for candidate in found]
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2}
    assert len(tune.candidates(kernel, tile, fields=1)) == numbers.count(1)


def test_a_field_that_a_kernel_lacks_is_not_changed() -> None:
    assert tune.candidates("depthwise", {"strips": 8}) == [{"strips": 4}]


def test_every_launch_of_a_bucket_is_timed_with_every_candidate(gpu: Gpu) -> None:
    seen: list[tune.Tuning] = []
    winners = tune.tune(network(), SHAPE, torch.float16, repeats=1, fields=1, keep=seen.append)
    tuning = seen[-1]
    assert winners == {}
    assert {tuned_configs.kernel_of(key) for key in tuning.candidates} == set(tune.CHOICES)
    for key, tiles in tuning.candidates.items():
        assert sorted(tuning.times[key]) == list(range(len(tiles)))
    # The rules' kernels are compiled first, and the others in few batches.
    assert len(gpu.compiled) >= 2
    assert max(gpu.compiled) <= 200


def test_a_faster_tile_wins_and_a_failing_one_is_rejected(gpu: Gpu) -> None:
    def milliseconds(launch: Launch) -> float:
        if launch.num_warps == 8:
            raise RuntimeError("out of registers")
        return 0.5 if launch.constants.get("BLOCK_N") == 32 else 1.0

    gpu.milliseconds = milliseconds
    seen: list[tune.Tuning] = []
    winners = tune.tune(network(), SHAPE, torch.float16, repeats=1, fields=1, keep=seen.append)
    rules = {key: tiles[0] for key, tiles in seen[-1].candidates.items()}
    assert winners
    for key, tile in winners.items():
        assert tile["block_n"] == 32
        # Shapes of a bucket may have other tiles by the rule than the first one has.
        assert tile != rules[key]
        times = seen[-1].times[key]
        assert min(times.values()) < times[0]
    rejected = [error for errors in seen[-1].rejected.values() for error in errors.values()]
    assert rejected
    assert set(rejected) == {"RuntimeError: out of registers"}


def test_the_buckets_that_take_longest_come_first(gpu: Gpu) -> None:
    gpu.milliseconds = lambda launch: 9.0 if launch.kernel.__name__.startswith("depthwise") else 1.0
    order: list[str] = []

    def keep(tuning: tune.Tuning) -> None:
        order.extend(
            f"{tuned_configs.kernel_of(key)} {len(times)}" for key, times in tuning.times.items() if len(times) == 2
        )

    tune.tune(network(), SHAPE, torch.float16, repeats=1, fields=1, keep=keep)
    assert order[0].startswith("depthwise")


def test_a_rule_that_fails_is_an_error_after_the_others_were_tuned(
    command: Callable[..., int], gpu: Gpu, tmp_path: Path
) -> None:
    def milliseconds(launch: Launch) -> float:
        if launch.kernel.__name__ == "depthwise_conv_kernel":
            raise RuntimeError("no such kernel")
        return 0.5 if launch.num_warps == 2 else 1.0

    gpu.milliseconds = milliseconds
    with pytest.raises(RuntimeError, match=r"launches fail as the rules configure them.*no such kernel"):
        command()
    kernels = {tuned_configs.kernel_of(key) for key in tuned_configs.read(tmp_path / "table.json")}
    assert kernels == {"depthwise_backward"}


def test_nothing_is_timed_after_the_minutes(gpu: Gpu) -> None:
    """A measurement takes a second of the clock."""
    seen: list[tune.Tuning] = []
    tune.tune(network(), SHAPE, torch.float16, repeats=1, fields=1, minutes=1.0, keep=seen.append)
    in_a_trial = max(collections.Counter(key for key in seen[-1].times).values()) * 8
    assert 60 <= len(gpu.timed) <= 60 + in_a_trial
    before = len(gpu.timed)
    tune.tune(network(), SHAPE, torch.float16, repeats=1, fields=1, minutes=0.0)
    assert len(gpu.timed) == before


def test_the_command_writes_winners_and_times(command: Callable[..., int], gpu: Gpu, tmp_path: Path) -> None:
    gpu.milliseconds = lambda launch: 0.5 if launch.num_warps == 2 else 1.0
    assert command("--minutes", "60") == 0
    configs = tuned_configs.read(tmp_path / "table.json")
    assert {tile["num_warps"] for tile in configs.values()} == {2}
    assert {tuned_configs.kernel_of(key) for key in configs} == {"depthwise", "depthwise_backward"}
    times = json.loads((tmp_path / "times.json").read_text())
    assert set(times["winners"]) == set(configs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_is_kept_when_the_run_ends_early(
    command: Callable[..., int], gpu: Gpu, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is interrupted, or the GPU fails for good, which the wait for it shows."""

    def milliseconds(launch: Launch) -> float:
        if len(gpu.timed) > 300:
            raise error("the end")
        return 0.5 if launch.constants.get("WIDTH") == 7 else 1.0

    def failing() -> None:
        raise error("the end")

    gpu.milliseconds = milliseconds
    monkeypatch.setattr(tune, "synchronize", failing)
    if error is KeyboardInterrupt:
        assert command() == 130
    else:
        with pytest.raises(RuntimeError, match="the end"):
            command()
    configs = tuned_configs.read(tmp_path / "table.json")
    assert configs
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["winners"].keys() == configs.keys()
    assert len(times["milliseconds"]) >= len(configs)
    assert not list(tmp_path.glob("*.partial"))
