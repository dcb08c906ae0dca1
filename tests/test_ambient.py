"""Settings of other libraries in the process change nothing: torch's default dtype and its default device."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from block_cases import BLOCKS, THIRD_PARTY_BLOCKS
from conftest import randomize
from native_cases import needs_native
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.fusion.spec import Epilogue, Prologue
from effnet_kernels.modules import FusedMBConvConfig, MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.9 fails to say which device is the default after that.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "cpu": lambda: default_device("cpu"),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}


def network() -> nn.Module:
    settings = [FusedMBConvConfig(4, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 2)]
    return randomize(ek.EfficientNet(settings, 0.0, 0.0, num_classes=5))


def train(module: nn.Module, x: Tensor) -> list[Tensor]:
    module, x = copy.deepcopy(module).train(), x.detach().requires_grad_()
    y = module(x)
    y.backward(y.detach())
    return [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def infer(module: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = module.eval()(x)
    return [y] if isinstance(y, Tensor) else list(y)


def operators(vectors: list[Tensor], x: Tensor) -> list[Tensor]:
    scale, shift, w, taps, w1, w2 = vectors
    input = x.detach().requires_grad_()
    prologue = Prologue(scale, None, "silu")
    outputs = [
        *ops.pointwise_conv(input, w, None, prologue, reduction="statistics"),
        *ops.pointwise_conv(input.detach(), w, None, prologue, Epilogue(None, w[:, 0, 0, 0], "relu"), "pool"),
        *ops.depthwise_conv(input, taps, 1, 1, prologue, reduction="statistics"),
        ops.depthwise_conv_bn_silu(input, taps, scale, shift, shift.clone(), scale.clone(), 1, 1, training=True),
        ops.squeeze(input, Prologue(None, shift, "silu")),
        ops.squeeze_excite(input, w1, None, w2, None),
        ops.bn_act_add(input, prologue),
        ops.channel_statistics(input.detach()),
    ]
    outputs = [y for y in outputs if y is not None]
    sum(y.square().sum() for y in outputs).backward()
    return [*outputs, input.grad]


def smoke_paths() -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    """Calls that are made ready under torch's own settings and then made under others."""

    def block(name: str, run: Callable) -> Callable:
        builder, shape = (BLOCKS | THIRD_PARTY_BLOCKS)[name]
        return lambda: partial(run, randomize(builder()), torch.randn(shape))

    def vectors() -> list[Tensor]:
        shapes = [(16, 8, 1, 1), (8, 1, 3, 3), (4, 8), (8, 4)]
        return [torch.rand(8) + 0.5, torch.randn(8), *(torch.randn(shape) for shape in shapes)]

    image = (2, 3, 33, 31)
    paths: dict[str, Callable] = {
        "network, training": lambda: partial(train, network(), torch.randn(image)),
        "network, inference": lambda: partial(infer, network(), torch.randn(image)),
        "engine": lambda: partial(infer, ek.freeze(network()), torch.randn(image)),
        "engine of maps": lambda: partial(infer, ek.freeze(network(), features_only=True), torch.randn(image)),
        "engine, frozen there": lambda: partial(lambda m, x: infer(ek.freeze(m), x), network(), torch.randn(image)),
        "operators": lambda: partial(operators, vectors(), torch.randn(2, 8, 5, 6)),
    }
    for name in BLOCKS | THIRD_PARTY_BLOCKS:
        # What stochastic depth draws is drawn in the input's dtype.
        paths[f"{name}, training"] = block(name, train)
        paths[f"{name}, inference"] = block(name, infer)
    return paths


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("path", smoke_paths())
def test_nothing_depends_on_torchs_defaults(path: str, setting: str) -> None:
    call = smoke_paths()[path]()
    torch.manual_seed(1)
    with select.use_backend("cpu") if "engine" not in path else contextlib.nullcontext():
        expected = call()
    torch.manual_seed(1)
    # Nothing is forced here: the kernels have to be chosen under these settings, too.
    with SETTINGS[setting]():
        actual = call()
    for ours, right in zip(actual, expected, strict=True):
        assert ours.dtype == right.dtype
        assert ours.device == right.device
        assert torch.equal(ours, right)


@pytest.mark.parametrize("setting", SETTINGS)
def test_explain_sees_the_same_kernels(setting: str) -> None:
    model, x = network(), torch.randn(1, 3, 33, 31)
    expected = ek.explain(model)
    with SETTINGS[setting]():
        assert ek.explain(model) == expected
        assert ek.explain(model, x) == expected
