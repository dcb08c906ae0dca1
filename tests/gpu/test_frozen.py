"""A frozen network on the Triton kernels against the eager path."""

import copy

import pytest
import torch
from test_compile import network
from torch import nn

from effnet_kernels import freeze
from effnet_kernels.backends import select
from gpu.compare import DTYPES, assert_accurate, channels_last
from gpu.conftest import simulated


def eager_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), select.use_backend("torch"):
        return copy.deepcopy(model).to(x.dtype)(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype: torch.dtype) -> None:
    model = network().eval().to("cuda")
    x = channels_last(2, 3, 33, 47, dtype=dtype)
    engine = freeze(model, dtype=dtype)
    assert select.operator_backend(x) == "triton"
    y = engine(x)
    assert y.dtype == dtype
    assert_accurate(y, eager_output(model, x.double()), None if dtype == torch.float32 else eager_output(model, x))
    assert torch.equal(engine(x.contiguous()), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_freezing_where_torch_allows_tf32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does by default, in which the proof would find differences of rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    freeze(network().eval().to("cuda"), dtype=dtype)
    assert torch.backends.cudnn.allow_tf32


def test_feature_maps() -> None:
    model = network().eval().to("cuda")
    x = channels_last(1, 3, 32, 40)
    maps = freeze(model, features_only=True)(x)
    with torch.no_grad(), select.use_backend("torch"):
        last = copy.deepcopy(model).double().features[:-1](x.double())
    assert maps[-1].is_contiguous(memory_format=torch.channels_last)
    assert_accurate(maps[-1], last)


def test_cuda_graphs() -> None:
    if simulated():
        pytest.skip("a simulated launch cannot be captured; tests/test_cuda_graphs.py replays stand-ins")
    model = network().eval().to("cuda")
    eager, engine = freeze(model), freeze(model, cuda_graph=True)
    for size in (32, 40, 32):
        x = channels_last(2, 3, size, 48)
        expected = eager(x)
        y = engine(x)
        engine(x + 1.0)
        assert torch.equal(y, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = engine(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)
