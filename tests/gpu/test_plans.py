"""Passes repeated by their launch plans against the same passes without plans, bit for bit.

The simulator runs launches on tensors, and a plan launches with addresses. So there the fixture keeps all tensors that
are read or allocated, and finds those to which addresses point.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_cases import BLOCKS, run
from conftest import randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import JITFunction

from effnet_kernels import EfficientNet, freeze
from effnet_kernels.backends import cpu, dense, select, triton
from effnet_kernels.backends.triton import launch, plan_launches, plans
from effnet_kernels.fusion.sequence import ChainSequence
from effnet_kernels.modules import MBConvConfig, fused_sequence
from gpu.compare import channels_last
from gpu.conftest import simulated

# Kinds of chains, and the dtype of their maps; the simulator takes seconds a launch.
CASES = [
    ("same padding", torch.float16),
    ("no expand, residual", torch.float32),
    ("no squeeze, relu6", torch.float16),
    ("stochastic depth", torch.float16),
    ("fused, residual", torch.float32),
    ("stem", torch.float16),
]


class Memory:
    """The tensors of a test, and handles that launch in the simulator with their addresses."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        self.storages[storage.data_ptr()] = storage
        return t

    def at(self, address: int, dtype: torch.dtype) -> Tensor:
        for start, storage in self.storages.items():
            if start <= address < start + storage.nbytes():
                offset = (address - start) // dtype.itemsize
                length = storage.nbytes() // dtype.itemsize - offset
                return torch.empty(0, dtype=dtype).set_(storage, offset, (length,), (1,))
        raise AssertionError(f"address {address:#x} is in no tensor of this test")

    def run_first(self, key: Any, kernel: Any, grid: Any, parameters: Any, constants: Any, options: Any) -> None:
        dtypes = [self.keep(p).dtype if isinstance(p, Tensor) else None for p in parameters]
        named = dict(launch._named(options))

        def execute(x: int, y: int, z: int, stream: Any, *arguments: Any) -> None:
            # A GPU's launch does nothing with torch's operators, either.
            with _disable_current_modes():
                given = [
                    self.at(value, dtype) if dtype is not None and isinstance(value, int) else value
                    for value, dtype in zip(arguments[5:], dtypes, strict=False)
                ]
                kernel[x, y, z](*given, *arguments[5 + len(given) :], **named)

        launch._handles[key] = (-1, execute, None, None, None)
        execute(*grid, 0, None, None, None, None, None, *parameters, *constants)


@pytest.fixture(autouse=True)
def _addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not simulated():
        yield
        return
    memory, run_planned = Memory(), plans.Plans.run

    def run_kept(self: plans.Plans, settings: Any, tensors: Any, compute: Any) -> Any:
        for t in tensors:
            if t is not None:
                memory.keep(t)
        return run_planned(self, settings, tensors, compute)

    for allocate in (torch.empty, torch.empty_like, torch.empty_strided):
        monkeypatch.setattr(torch, allocate.__name__, lambda *a, allocate=allocate, **k: memory.keep(allocate(*a, **k)))
    monkeypatch.setattr(dense, "conv", lambda *arguments, conv=dense.conv: memory.keep(conv(*arguments)))
    monkeypatch.setattr(plans.Plans, "run", run_kept)
    # The launchers then take the simulator for a GPU.
    monkeypatch.setattr(launch, "_TRITONS_FILE", inspect.getfile(JITFunction.run))
    monkeypatch.setattr(launch, "_run_first", memory.run_first)
    monkeypatch.setattr(launch, "_handles", launch._handles)
    monkeypatch.setattr(plan_launches, "driver_functions", lambda: None)
    monkeypatch.setattr(triton, "off_device", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    before = dict(launch._handles)
    yield
    launch._handles.clear()
    launch._handles.update(before)


def planned(module: nn.Module) -> list[str]:
    """Which passes of a module have plans."""
    kept = module.lowered().plans._plans
    return sorted(key[0][0] for key, plan in kept.items() if callable(plan))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_training(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = BLOCKS[name]
    first = channels_last(*shape, dtype=dtype)
    block = randomize(make()).train().to(first.device)
    other = copy.deepcopy(block)
    versions = [b._version - c._version for b, c in zip(block.buffers(), other.buffers(), strict=True)]
    with torch.no_grad(), select.use_backend("torch"):
        grad = torch.randn_like(copy.deepcopy(block)(first.float()))
    for number in range(3):
        # The values differ each time, and where a plan reads them from does too.
        x = channels_last(*shape, dtype=dtype)
        results = run(block, x, grad, "triton")
        with monkeypatch.context() as patch:
            patch.setattr(plans, "_circumstances", lambda x: None)
            expected = run(other, x, grad, "triton")
        assert planned(block) == ([] if number == 0 else ["backward", "forward"])
        assert not planned(other)
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)
        for (key, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), key
            assert p.grad.stride() == q.grad.stride(), key
        for (key, b), c, version in zip(block.named_buffers(), other.buffers(), versions, strict=True):
            assert torch.equal(b, c), key
            assert b._version - c._version == version, key


def test_the_extension_launches_on_gpus_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(plans, "run_of", lambda launches: made.append(plan_launches.run_of(launches)) or made[-1])
    make, shape = BLOCKS["no expand, residual"]
    x = channels_last(*shape)
    block = randomize(make()).train().to(x.device)
    for _ in range(2):
        run(block, x, torch.ones_like(x), "triton")
    if torch.version.hip is None and "ttsem" not in sys.modules:
        assert plan_launches.driver_functions() is not None
    by_extension = plan_launches.driver_functions() is not None and cpu.unavailable_reason() is None
    expected = plan_launches.ByExtension if by_extension else plan_launches.ByTriton
    assert [type(launches) for launches in made] == [expected, expected]


def test_inference() -> None:
    make, shape = BLOCKS["no expand, residual"]
    x = channels_last(*shape, dtype=torch.float16)
    block = randomize(make()).eval().to(x.device)
    first, second, third = (run(block, x, None, "triton")[0] for _ in range(3))
    assert planned(block) == ["infer"]
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_network_with_a_pooled_head() -> None:
    x = channels_last(2, 3, 16, 16)
    settings = [MBConvConfig(1, 3, 1, 32, 16, 1)]
    model = randomize(EfficientNet(settings, 0.0, num_classes=4, last_channel=32)).to(x.device)
    with select.use_backend("triton"):
        states = []
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
            states.append([p.grad for p in model.parameters()])
        for later in states[1:]:
            assert all(torch.equal(a, b) for a, b in zip(states[0], later, strict=True))
        assert planned(model.features[-1]) == ["backward", "forward"]
        model.eval()
        with torch.no_grad():
            engine = freeze(model, verify=False)
            want = engine(x)
            assert torch.equal(engine(x), want)
            assert torch.equal(engine(x), want)
            first, second, third = (model(x) for _ in range(3))
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        sequence = fused_sequence._sequences.get(model.features)
        assert isinstance(sequence, ChainSequence)
        # The block and the head behind the stem are one plan.
        assert [len(run.plans._plans) for run in sequence._runs] == [0, 1]


def test_a_block_whose_tensors_change() -> None:
    """Parameters that lie elsewhere, in another dtype or in another order get what their own values say."""
    make, shape = BLOCKS["no expand, residual"]
    x = channels_last(*shape)
    block = randomize(make()).train().to(x.device)
    for _ in range(2):
        run(block, x, None, "triton")
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    changes = [
        lambda: [setattr(c.weight, "data", torch.randn_like(c.weight)) for c in convs],
        lambda: setattr(convs[-1].weight, "data", convs[-1].weight.half()),
        lambda: setattr(convs[-1].weight, "data", convs[-1].weight.float()),
        lambda: setattr(convs[-1].weight, "data", torch.randn(24, 24, 1, 1, device=x.device).transpose(0, 1)),
    ]
    for change in changes:
        change()
        y, again = (run(block, x, None, "triton")[0] for _ in range(2))
        expected, _ = run(copy.deepcopy(block), x, None, "triton")
        assert torch.equal(y, expected)
        assert torch.equal(again, expected)
