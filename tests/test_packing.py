"""Chains that are packed for inference: right after every change of a parameter, however it was made."""

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from block_cases import BLOCKS
from conftest import assert_close, randomize, relative_rms, traces_operators
from native_cases import kernel_isas, needs_native, running
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.backends.cpu.memory import fingerprint
from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion import packing
from effnet_kernels.modules.fused_module import FusedModule

pytestmark = needs_native

BF16 = torch.bfloat16
# The instruction where the processor has it, and elsewhere its emulation.
BF16_ISAS = kernel_isas(BF16)[-1:]


def block(name: str = "expand", dtype: torch.dtype = torch.float32) -> tuple[FusedModule, Tensor]:
    torch.manual_seed(0)
    make, shape = BLOCKS[name]
    module = randomize(make()).eval().requires_grad_(False).to(dtype)
    assert isinstance(module, FusedModule)
    return module, torch.randn(shape).to(dtype)


def eager(module: nn.Module, x: Tensor) -> Tensor:
    with ek.use_backend("torch"):
        return copy.deepcopy(module)(x)


def is_packed(module: FusedModule) -> bool:
    return bool(packed_dtypes(module))


def packed_dtypes(module: FusedModule) -> set[torch.dtype]:
    spec = module.lowered()
    assert not isinstance(spec, str)
    assert spec.packed is not None
    return {dtype for (_, dtype), packed in spec.packed._packed.items() if packed.network is not None}


def add(t: Tensor) -> None:
    t.view(-1)[-1] += 0.5


def in_data(t: Tensor) -> None:
    t.data.view(-1)[-1] += 0.5


def in_numpy(t: Tensor) -> None:
    t.numpy().reshape(-1)[-1] += 0.5


def other_memory(t: Tensor) -> None:
    t.data = t.data + 0.01


def other_strides(t: Tensor) -> None:
    changed = t.data + 0.01
    t.data = torch.empty(2 * t.numel(), dtype=t.dtype)[::2].view(t.shape).copy_(changed)


def swapped(t: Tensor) -> None:
    first, last = t.view(-1)[0].clone(), t.view(-1)[-1].clone()
    t.data.view(-1)[0], t.data.view(-1)[-1] = last, first


@pytest.mark.parametrize("change", [add, in_data, in_numpy, other_memory, other_strides, swapped])
@pytest.mark.parametrize("name", ["expand", "no expand, residual", "fused, residual", "stem", "head"])
def test_every_change_of_a_parameter_is_seen(name: str, change: Callable[[Tensor], None]) -> None:
    module, x = block(name)
    floating = [(name, t) for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()]
    for key, tensor in floating:
        before = module(x)
        assert torch.equal(module(x), before)
        change(tensor)
        y = module(x)
        assert_close(y, eager(module, x))
        assert not torch.equal(y, before), key


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(module, backend="aot_eager", fullgraph=True)
    return run


@traces_operators
@pytest.mark.parametrize("change", [add, in_data, in_numpy, other_memory, swapped])
@pytest.mark.parametrize("name", ["expand", "no expand, residual", "fused, residual", "stem", "head"])
def test_a_compiled_graph_sees_every_change_of_a_parameter(name: str, change: Callable[[Tensor], None]) -> None:
    module, x = block(name)
    run = compiled(module)
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        before = run(x)
        assert torch.equal(before, module(x)), "the same network"
        change(tensor)
        y = run(x)
        assert_close(y, eager(module, x))
        assert not torch.equal(y, before), key


@traces_operators
def test_a_compiled_graph_packs_each_chain_once_and_only_while_there_are_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr(packing, "Network", lambda *a, **k: made.append(0) or Network(*a, **k))
    gc.collect()
    before = len(packing._by_weight)
    model = randomize(ek.efficientnet_b0(num_classes=3)).eval().requires_grad_(False)
    run, x = compiled(model), torch.randn(2, 3, 32, 32)
    first = run(x)
    for _ in range(2):
        assert torch.equal(run(x), first)
    assert len(made) == len(packing._by_weight) - before == 18
    del model, run
    torch.compiler.reset()
    gc.collect()
    assert len(packing._by_weight) == before


def test_the_same_numbers_in_other_strides_are_seen() -> None:
    module, x = block("no expand, residual")
    weight = module.get_parameter("block.2.0.weight")
    assert weight.shape == (24, 24, 1, 1)
    before = module(x)
    weight.data = weight.data.transpose(0, 1)
    assert_close(module(x), eager(module, x))
    assert not torch.equal(module(x), before)


def test_the_chain_is_packed_once() -> None:
    module, x = block()
    first = module(x)
    assert is_packed(module)
    networks = [packed.network for packed in module.lowered().packed._packed.values()]  # type: ignore[union-attr]
    assert torch.equal(module(x), first)
    assert [packed.network for packed in module.lowered().packed._packed.values()] == networks  # type: ignore[union-attr]


def test_the_memory_is_given_back() -> None:
    module, x = block()
    first = module(x)
    ek.release_memory()
    assert not is_packed(module)
    assert torch.equal(module(x), first)
    assert is_packed(module)


@pytest.mark.parametrize("channels", [3, 7, 12])
def test_any_number_of_channels_is_packed(channels: int) -> None:
    timm_blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")
    torch.manual_seed(0)
    block = timm_blocks.InvertedResidual(channels, channels, exp_ratio=3.0)
    module, x = randomize(ek.accelerate(block)).eval(), torch.randn(2, channels, 9, 9)
    with torch.no_grad():
        assert_close(module(x), eager(module, x))
        assert is_packed(module)


def with_gaps(module: nn.Module) -> None:
    """Gives a weight memory that holds other numbers in between."""
    weight = module.get_parameter("block.0.0.weight")
    weight.data = weight.data.repeat_interleave(2, 0)[::2]


def test_weights_that_cannot_be_packed() -> None:
    module, x = block()
    with_gaps(module)
    for _ in range(2):
        assert_close(module(x), eager(module, x))
    assert not is_packed(module)


def test_threads_share_a_packed_chain() -> None:
    module, x = block()
    expected, found = eager(module, x), []
    threads = [threading.Thread(target=lambda: found.append(module(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for y in found:
        assert_close(y, expected)


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_in_bfloat16(name: str, autocast: bool, isa: str) -> None:
    """A model in bfloat16, or one in float32 under autocast, without gradients: as near to float64 as torch is."""
    module, x = block(name, torch.float32 if autocast else BF16)
    x = x.to(BF16)
    exact = eager(copy.deepcopy(module).double(), x.double())
    with running(isa, 1), torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        y, theirs = module(x), eager(module, x)
    assert y.dtype == theirs.dtype == BF16
    assert packed_dtypes(module) == {BF16}
    assert relative_rms(y, exact) <= 1.25 * relative_rms(theirs, exact)
    # Each instruction set has its own answer.
    with running("scalar", 1), torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        assert relative_rms(module(x), exact) <= 1.25 * relative_rms(theirs, exact)
    assert packed_dtypes(module) == ({BF16, torch.float32} if autocast else {BF16})


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_weights_that_cannot_be_packed_in_bfloat16(isa: str) -> None:
    module, x = block("expand", BF16)
    with_gaps(module)
    with running(isa, 1):
        for _ in range(2):
            assert torch.equal(module(x), eager(module, x))
            assert {row.backend for row in ek.explain(module, x)} == {"torch"}


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("change", [add, in_data, other_memory, other_strides])
def test_every_change_is_seen_in_bfloat16(change: Callable[[Tensor], None], isa: str) -> None:
    module, x = block("no expand, residual", BF16)
    floating = [(name, t) for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()]
    with running(isa, 1), torch.no_grad():
        for key, tensor in floating:
            before = module(x)
            change(tensor)
            y = module(x)
            assert relative_rms(y, eager(module, x)) < 2e-2
            assert not torch.equal(y, before), key


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_what_torch_computes_in_bfloat16(isa: str) -> None:
    """Gradients, batch statistics, other devices and weights of another dtype."""
    module, x = block("expand", BF16)
    with running(isa, 1):
        with torch.enable_grad():
            assert torch.equal(module(x), eager(module, x))
        with torch.no_grad():
            assert {row.backend for row in ek.explain(module, x)} == {"cpu"}
            trained = copy.deepcopy(module).train()
            assert {row.backend for row in ek.explain(trained, x)} == {"torch"}
            statistics = trained.state_dict()["block.0.1.running_mean"].clone()
            trained(x)
            assert not torch.equal(trained.state_dict()["block.0.1.running_mean"], statistics)
            elsewhere = copy.deepcopy(module).to("meta")
            assert {row.backend for row in ek.explain(elsewhere, x.to("meta"))} == {"torch"}
            assert elsewhere(x.to("meta")).shape == module(x).shape
            ek.release_memory()
            with pytest.raises(RuntimeError, match="type"):
                module.float()(x)
        assert not is_packed(module)


@pytest.mark.parametrize("isa", kernel_isas())
def test_a_fingerprint_depends_on_every_bit_and_on_nothing_else(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 3, 31, 32, 33, 100, 20_000, 70_001]
    parts = [torch.randn(size, generator=generator) for size in sizes]
    with running(isa, 1):
        whole = fingerprint(parts)
        assert fingerprint([part.clone() for part in parts]) == whole
    with running(None, 2):
        assert fingerprint(parts) == whole
    hashes = {whole}
    changes = 0
    with running(isa, 2):
        for part in parts:
            bits = part.view(torch.int32)
            for index in {0, part.numel() // 2, part.numel() - 1}:
                for bit in (0, 15, 30, 31):
                    before = bits[index].item()
                    bits[index] = (before ^ (1 << bit)) if bit < 31 else before ^ -(2**31)
                    hashes.add(fingerprint(parts))
                    bits[index] = before
                    changes += 1
            # A sign in each of several numbers.
            part.neg_()
            hashes.add(fingerprint(parts))
            part.neg_()
            changes += 1
        hashes |= {fingerprint(parts[::-1]), fingerprint(parts[:-1])}
        assert fingerprint(parts) == whole
    assert len(hashes) == 1 + changes + 2
