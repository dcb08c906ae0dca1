"""The bytes that ``benchmarks/requested_bytes.py`` counts for a launch, against the accesses of its execution."""

import importlib

import pytest
import torch
from torch import nn

from effnet_kernels.backends import select
from effnet_kernels.backends.triton import launch as seam
from effnet_kernels.modules import MBConvConfig
from gpu.compare import channels_last

pytestmark = pytest.mark.skipif(
    not seam.simulated(), reason="a GPU does not report its accesses: run these under ttsem"
)


@pytest.fixture
def accessed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of float16 elements that all kernels access: "counted" by the simulator's memory, and "predicted"."""
    from requested_bytes import requested_bytes
    from ttsem.memory import Memory

    totals = {"counted": 0, "predicted": 0}

    def counting(original):
        def access(self, addresses, *arguments):
            mask = arguments[0] if original.__name__ == "load" else arguments[1]
            element = arguments[2].itemsize if original.__name__ == "load" else arguments[0].dtype.itemsize
            if element == 2:
                live = addresses.size if mask is None else int(torch.tensor(mask).expand(addresses.shape).sum())
                totals["counted"] += 2 * live
            return original(self, addresses, *arguments)

        return access

    monkeypatch.setattr(Memory, "load", counting(Memory.load))
    monkeypatch.setattr(Memory, "store", counting(Memory.store))

    def counted(original):
        def launch(grid, **arguments):
            with seam.capture_launches() as launches:
                original(grid, **arguments)
            # Only maps and matrices are of float16 here.
            for name, size in requested_bytes(launches[0]).items():
                totals["predicted"] += size * (launches[0].arguments[name].dtype == torch.float16)
            original(grid, **arguments)

        return launch

    for name in ("pointwise", "depthwise", "batch_norm", "squeeze_excite", "bn_act_add"):
        module = importlib.import_module(f"effnet_kernels.backends.triton.{name}")
        for key, launcher in list(vars(module).items()):
            if key.startswith("launch_") and callable(launcher):
                monkeypatch.setattr(module, key, counted(launcher))
    return totals


def halve_matrices(block: nn.Module) -> None:
    """Casts the weights that kernels read as matrices to float16, so that float16 means a map or a matrix."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and not name.endswith(("fc1", "fc2")):
            module.half()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"), [(3, 1, "symmetric", 15), (5, 2, "same", 17), (5, 1, "symmetric", 9)]
)
def test_a_training_step(accessed: dict[str, int], kernel: int, stride: int, padding: str, size: int) -> None:
    config = MBConvConfig(4, kernel, stride, 16, 16, 1, padding=padding)
    block = config.block(config, 0.0, nn.BatchNorm2d)
    halve_matrices(block)
    x = channels_last(2, 16, size, size, dtype=torch.float16).requires_grad_()
    with select.use_backend("triton"):
        y = block(x)
        y.backward(torch.randn_like(y))
    assert accessed["counted"] == accessed["predicted"] > 0


def test_inference(accessed: dict[str, int]) -> None:
    config = MBConvConfig(6, 3, 1, 40, 40, 1)
    block = config.block(config, 0.0, nn.BatchNorm2d).eval()
    halve_matrices(block)
    with torch.no_grad(), select.use_backend("triton"):
        block(channels_last(3, 40, 14, 14, dtype=torch.float16))
    assert accessed["counted"] == accessed["predicted"] > 0
