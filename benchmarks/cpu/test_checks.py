"""What checking the operands of native calls costs: B0 at batch 1, with the checks and with bare addresses."""

from collections.abc import Iterator

import pytest
import torch

import effnet_kernels as ek
from effnet_kernels.backends import cpu
from effnet_kernels.backends.cpu import batch_norm, bn_act_add, dense, depthwise, memory, pointwise, squeeze_excite

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")


def _bare(name: str, tensor: torch.Tensor | None, *shape: int, **layout: object) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@pytest.fixture(params=["checked", "bare"])
def addresses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "bare":
        for module in (batch_norm, dense, depthwise, memory, bn_act_add, pointwise, squeeze_excite):
            for name in ("address", "map_address"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, _bare)
    return request.param


# At 32x32 the calls themselves are most of the time.
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("training", [False, True])
def test_b0(benchmark, addresses: str, size: int, training: bool) -> None:
    model = ek.efficientnet_b0().train(training)
    # A batch of one cannot train: its last maps have one pixel.
    x = torch.randn(1 + training, 3, size, size)
    benchmark.extra_info["addresses"] = addresses
    benchmark.group = f"b0 at {size}, {'a training step' if training else 'inference'}"

    def call() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.sum().backward()

    benchmark(call)
