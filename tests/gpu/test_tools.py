"""The self-test, the tuner and the warm-up, on a network small enough for the simulator."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import randomize

from effnet_kernels import EfficientNet, warmup
from effnet_kernels.backends import select
from effnet_kernels.backends.triton.configs import tuned_configs
from effnet_kernels.backends.triton.launch import simulated
from effnet_kernels.modules import MBConvConfig
from effnet_kernels.tools.cli import main
from effnet_kernels.tools.selftest import selftest
from effnet_kernels.tools.tune import CHOICES, tune
from effnet_kernels.tools.warmup import gpu_autocast
from gpu.compare import assert_accurate, channels_last


@pytest.fixture(autouse=True)
def _autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast for a GPU does nothing where there is none; the simulator's tensors are the host's."""
    if not simulated():
        return
    original = torch.autocast

    @contextlib.contextmanager
    def autocast(device: str, dtype: torch.dtype, enabled: bool = True) -> Iterator[None]:
        with original("cpu", dtype, enabled=enabled), gpu_autocast(dtype if enabled else None):
            yield

    monkeypatch.setattr(torch, "autocast", autocast)


def network() -> EfficientNet:
    return randomize(EfficientNet([MBConvConfig(2, 3, 2, 8, 16, 1)], 0.0, num_classes=3))


def test_selftest_passes_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("effnet_kernels.create_model", lambda name: network())
    report = tmp_path / "report.json"
    arguments = ["selftest", "--batch", "2", "--resolution", "24", "--rounds", "1", "--json", str(report)]
    assert main(arguments) == 0
    written = json.loads(report.read_text())
    assert written["passed"]
    assert len(written["checks"]) == 5
    assert {speed["name"] for speed in written["speeds"]} == {"inference, float16", "training, autocast float16"}


def test_selftest_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from effnet_kernels.backends.triton import primitives

    right = primitives.mean_of_sums
    monkeypatch.setattr(primitives, "mean_of_sums", lambda sums, count: right(sums, count + 1))
    report = selftest(network, resolution=24, batch=2, rounds=1)
    assert not report.passed
    assert "FAILED" in str(report)


def test_rules_follow_what_tuning_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kernel in CHOICES:
        monkeypatch.setitem(CHOICES, kernel, {"num_warps": (2,)})
    # The time that a simulator takes means nothing, so that two warps are made to win.
    times = iter([2.0, 1.0] * 10_000)
    monkeypatch.setattr("effnet_kernels.tools.tune.measure", lambda launch: (launch(), next(times))[1])
    monkeypatch.setattr("effnet_kernels.tools.tune.GAIN", 0.0)
    model, x = network().cuda(), channels_last(1, 3, 16, 16)
    winners = tune(model, tuple(x.shape), torch.float32, repeats=1)
    assert winners
    path = tmp_path / "table.json"
    monkeypatch.setenv("EFFNET_KERNELS_TABLE", str(path))
    tuned_configs.write(path, {key: {"num_warps": 2} for key in winners})
    try:
        model.eval()
        with torch.no_grad(), select.use_backend("triton"):
            y = model(x)
        with torch.no_grad(), select.use_backend("torch"):
            assert_accurate(y, model.double()(x.double()))
    finally:
        monkeypatch.undo()
        tuned_configs.clear_caches()


@pytest.mark.skipif(simulated(), reason="a simulated launch needs no binary; tests/test_launch.py compiles ahead")
def test_warmup_leaves_nothing_to_compile() -> None:
    model = network().cuda()
    assert warmup(model, (2, 3, 24, 24)) > 10
