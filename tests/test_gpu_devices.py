"""The tests of the GPU kernels, and their launches, keep to one device: on tensors that only say they are on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="the fake GPU is made of the fake tensors of torch 2.11 and newer"
)
TESTS = Path(__file__).parent

PLANTED = """
import pytest
import torch

from effnet_kernels.modules import ConvBnAct


def test_right():
    x = torch.randn(1, 16, 5, 5, device="cuda", requires_grad=True)
    y = ConvBnAct(16, 24, 1).cuda()(x)
    y.backward(torch.ones_like(y))
    assert x.grad.device == y.device


def test_operation():
    torch.randn(3, device="cuda") + torch.randn(3)


def test_module_left_behind():
    ConvBnAct(16, 24, 1)(torch.randn(1, 16, 5, 5, device="cuda"))


def test_gradient_left_behind():
    ConvBnAct(16, 24, 1).cuda()(torch.randn(1, 16, 5, 5, device="cuda")).backward(torch.ones(1, 24, 5, 5))


def test_launch():
    from effnet_kernels.backends.triton.pointwise import pointwise_conv
    from effnet_kernels.fusion.spec import Epilogue, Prologue

    x = torch.randn(1, 16, 5, 5, device="cuda").contiguous(memory_format=torch.channels_last)
    pointwise_conv(x, torch.randn(24, 16, 1, 1), None, Prologue(), Epilogue(), "none")


def test_comparison():
    assert torch.equal(torch.ones(3, device="cuda"), torch.ones(3))
"""


def run_on_fake_gpu(path: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton", reason="the launches of Triton kernels")
    search = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gpu.fake_gpu", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_gpus_tests_keep_to_one_device() -> None:
    result = run_on_fake_gpu(TESTS / "gpu")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_tensors_on_two_devices_are_noticed(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text(PLANTED)
    result = run_on_fake_gpu(planted)
    assert "5 failed, 1 passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]


def test_what_a_day_on_a_gpu_launches_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the launches of Triton kernels")
    import gpu_prepare

    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # the script sets it
    monkeypatch.setattr(sys, "argv", ["gpu_prepare.py", str(cache), "--toy"])
    found = []

    def compile_nothing(binaries: list, target: object, processes: int | None) -> None:
        assert os.environ["TRITON_CACHE_DIR"] == str(cache)
        found.extend(binaries)
        for name in ("kernel.ttir", "kernel.cubin", "kernel.json"):
            (cache / "key").mkdir(parents=True, exist_ok=True)
            (cache / "key" / name).write_text("text")

    monkeypatch.setattr(gpu_prepare, "compile_in_parallel", compile_nothing)
    assert gpu_prepare.main() == 0
    assert {"pointwise_conv_backward_weight_kernel", "excite_kernel"} <= {b.kernel.__name__ for b in found}, "a step's"
    assert {"relu6", "hardswish"} <= {dict(b.constants).get("ACT") for b in found}, "those of the tests"
    assert {path.name: path.stat().st_size for path in (cache / "key").iterdir()} == {
        "kernel.ttir": 0,
        "kernel.cubin": 4,
        "kernel.json": 4,
    }
