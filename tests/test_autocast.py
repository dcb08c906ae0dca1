"""Autocast and bfloat16 on the CPU.

Under autocast the native kernels compute in float32, and packed networks in bfloat16 where the processor has kernels
for it. Models in bfloat16 infer by packed networks, and run as torch has them, in channels-last strides, elsewhere.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from block_cases import BLOCKS, THIRD_PARTY_BLOCKS, mbconv
from conftest import TOLERANCES, assert_buffers_close, assert_close, randomize, relative_rms
from native_cases import needs_native, pools_memory
from test_compile import network, torchvision_network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effnet_kernels as ek
from effnet_kernels import ops
from effnet_kernels.backends.cpu.memory import cast_map
from effnet_kernels.backends.select import BackendError
from effnet_kernels.fusion import forward
from effnet_kernels.fusion.spec import Prologue
from effnet_kernels.modules import FusedMBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]
HALVES = [torch.bfloat16, torch.float16]


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor, grad: Tensor, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The output and the input's gradient; from one seed, so that stochastic depth draws the same."""
    torch.manual_seed(1)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = block(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS | THIRD_PARTY_BLOCKS)
def test_blocks(name: str, training: bool, autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is that of float32, rounded once at its end: output, every gradient, running statistics."""
    monkeypatch.setattr(forward, "runs_bf16", lambda: False)
    make, shape = (BLOCKS | THIRD_PARTY_BLOCKS)[name]
    block = randomize(make()).train(training)
    # Another dtype than autocast's is torch's to add to, see test_residuals_of_another_dtype().
    for dtype in (autocast,) if block.chain_spec().chain.residual else (torch.float32, autocast):
        x = channels_last(*shape).to(dtype)
        with ek.use_backend("torch"), torch.no_grad():
            grad = torch.randn_like(copy.deepcopy(block)(x.float())).to(autocast)
        cast, single, exact = (copy.deepcopy(block) for _ in range(3))
        y, grad_x = step(cast, x, grad, autocast)
        y_single, grad_single = step(single, x.float(), grad.float())
        with ek.use_backend("torch"):
            y_exact, grad_exact = step(exact.double(), x.double(), grad.double())
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, y_single.to(autocast))
        assert torch.equal(grad_x, grad_single.to(dtype))
        assert y.dtype == autocast
        assert relative_rms(y, y_exact) <= torch.finfo(autocast).eps
        assert relative_rms(grad_x, grad_exact) <= torch.finfo(autocast).eps
        for (key, p), q, r in zip(cast.named_parameters(), single.parameters(), exact.parameters(), strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, q.grad), key
            assert p.grad.stride() == p.stride(), key
            assert relative_rms(p.grad, r.grad) <= TOLERANCES[torch.float32], key
        for ours, theirs in zip(cast.buffers(), single.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        assert_buffers_close(cast, exact.float())


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("ratio", [1, 4])
def test_dense_convolutions_in_bfloat16(
    ratio: int, residual: bool, training: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a processor has instructions for bfloat16, they are as exact as torch's own under autocast.

    Or as exact as their output is rounded: torch leaves the sum with a residual in float32.
    """
    rounding = torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(forward, "runs_bf16", lambda: True)
    config = FusedMBConvConfig(ratio, 3, 1 if residual else 2, 16, 16 if residual else 24, 1)
    block, x = randomize(config.block(config, 0.0, nn.BatchNorm2d)).train(training), channels_last(4, 16, 14, 12)
    x = x.bfloat16() if residual else x
    with ek.use_backend("torch"), torch.no_grad():
        grad = torch.randn_like(copy.deepcopy(block)(x.float()))
    ours, theirs, exact, single = (copy.deepcopy(block) for _ in range(4))
    # What a block that computes in float32 throughout has exactly, see test_blocks().
    rounded_at_the_end = step(single, x.float(), grad.bfloat16().float())[0].bfloat16()
    with ek.use_backend("torch"):
        right = step(exact.double(), x.double(), grad.double())
        bounds = step(theirs, x, grad, torch.bfloat16)
    if not recorded:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
        assert relative_rms(y, right[0]) <= max(2 * relative_rms(bounds[0], right[0]), rounding)
        assert not torch.equal(y, rounded_at_the_end)
        return
    found = step(ours, x, grad, torch.bfloat16)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, x.dtype)
    for own, other, value in zip(found, bounds, right, strict=True):
        assert relative_rms(own, value) <= max(2 * relative_rms(other, value), rounding)
    for (key, p), q, r in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32, key
        assert relative_rms(p.grad, r.grad) <= 2 * relative_rms(q.grad, r.grad), key
    assert not torch.equal(found[0], rounded_at_the_end)
    weights = (dict(called.named_parameters())["block.0.0.weight"] for called in (ours, single))
    assert not torch.equal(*(weight.grad for weight in weights))


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "name", ["expand", "fused, residual", "torchvision", "timm, dense with an excitation", "efficientnet_pytorch"]
)
def test_residuals_of_another_dtype(name: str, together: bool, given: torch.dtype) -> None:
    """A residual that is not in autocast's dtype is added as the block's own package adds it."""
    make, shape = (BLOCKS | THIRD_PARTY_BLOCKS)[name]
    block, x = randomize(make()).eval(), channels_last(*shape).to(given)
    model = ek.accelerate(nn.Sequential(block, copy.deepcopy(block))) if together else block
    eager = ek.restore(copy.deepcopy(model))
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16):
            ours = model(x)
            with ek.use_backend("torch"):
                theirs = eager(x)
        assert_close(ours, theirs, torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert "residual" in (ek.explain(block, x)[0].reason or "")


@pytest.mark.parametrize("name", ["expand", "fused", "stem", "head"])
def test_kernels_run(name: str) -> None:
    make, shape = BLOCKS[name]
    block, x = make(), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x.bfloat16(),) if name == "expand" else (x, x.bfloat16(), x.half()):
            y = block(given)
            assert type(y.grad_fn).__name__ in ("ChainFunctionBackward", "CloneBackward0")
            assert {row.backend for row in ek.explain(block, given)} == {"cpu"}
        assert ek.explain(block, x.double())[0].reason == "the native kernels compute in float32, not float64"
    assert ek.explain(block, x.bfloat16())[0].reason == "the native kernels compute in float32, not bfloat16"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_grad", [True, False])
def test_outputs_keep_the_memory_format(memory_format: torch.memory_format, with_grad: bool) -> None:
    block, x = mbconv(2, 3, 1, 16, 16), torch.randn(2, 16, 7, 9).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16):
        assert block(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training: bool) -> None:
    """Nothing is recorded; in training the statistics move."""
    block, x = randomize(mbconv(2, 3, 1, 16, 16, probability=0.5)).train(training), torch.randn(4, 16, 7, 9).bfloat16()
    expected, recorded = copy.deepcopy(block), copy.deepcopy(block)
    outputs = []
    for called, grad, enabled in ((block, False, True), (recorded, True, True), (expected, True, False)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(called(x if enabled else x.float()))
        assert_buffers_close(called, block)
    assert torch.equal(outputs[1], outputs[2].bfloat16())
    if training:
        assert torch.equal(outputs[0], outputs[1])
    else:
        # Packed networks compute in bfloat16 where they can.
        assert relative_rms(outputs[0], outputs[2]) < 1e-2


def test_switched_off_inside() -> None:
    block, x = mbconv(2, 3, 1, 16, 16).eval(), torch.randn(2, 16, 7, 9)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(block(x), block(x.clone()))
        assert block(x).dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["expand", "fused", "stem"])
def test_backward_inside_of_autocast(name: str, backend: str) -> None:
    """Autocast would cast the operands of those of torch's functions that a backward pass calls."""
    make, shape = BLOCKS[name]
    block, x = make(), torch.randn(shape).bfloat16()
    gradients = []
    for inside in (True, False):
        block.zero_grad()
        with ek.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = block(x).float().square().sum()
            with torch.autocast("cpu", enabled=inside):
                loss.backward()
        gradients.append([p.grad for p in block.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    block, x, grad = mbconv(2, 3, 1, 16, 16), torch.randn(4, 16, 7, 9), torch.randn(4, 16, 7, 9)
    eager = copy.deepcopy(block)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(block, x, use_reentrant=reentrant)

    for ours, theirs in zip(step(Checkpointed(), x, grad, HALVES[0]), step(eager, x, grad, HALVES[0]), strict=True):
        assert torch.equal(ours, theirs)
    for p, q in zip(block.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_batched_gradients() -> None:
    block, x = mbconv(2, 3, 1, 16, 16), torch.randn(2, 16, 7, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    grads = torch.randn(3, *y.shape).bfloat16()
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for g, expected in zip(batched, grads, strict=True):
        assert torch.equal(g, torch.autograd.grad(y, x, expected, retain_graph=True)[0])


# Networks


def timm_network() -> nn.Module:
    timm = pytest.importorskip("timm")
    return ek.accelerate(randomize(timm.create_model("efficientnet_lite0", num_classes=5)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": network,
    "torchvision's, accelerated": torchvision_network,
    "timm's, accelerated": timm_network,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, training: bool) -> None:
    """Logits and gradients are closer to float64's than torch's under autocast, and the statistics as close."""
    model, x = NETWORKS[name]().train(training), torch.randn(4, 3, 65, 47)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert "cpu" in {row.backend for row in ek.explain(model, x)}
        with ek.use_backend("torch"):
            theirs = eager(x)
    with ek.use_backend("torch"):
        expected = exact(x.double())
    for y in (logits, theirs, expected):
        y.square().sum().backward()
    assert logits.dtype == theirs.dtype == torch.bfloat16
    assert relative_rms(logits, expected) <= max(relative_rms(theirs, expected), torch.finfo(torch.bfloat16).eps)
    ours, torchs, right = (
        torch.cat([p.grad.double().flatten() for p in each.parameters()]) for each in (model, eager, exact)
    )
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert relative_rms(ours, right) <= 1.5 * relative_rms(torchs, right)
    for buffers in zip(model.buffers(), eager.buffers(), exact.buffers(), strict=True):
        if buffers[0].is_floating_point():
            assert buffers[0].dtype == torch.float32
            assert relative_rms(buffers[0], buffers[2]) <= 2 * relative_rms(buffers[1], buffers[2]) + 1e-5
        else:
            assert torch.equal(buffers[0], buffers[2])


@pytest.mark.parametrize("dtype", HALVES)
def test_feature_maps(dtype: torch.dtype) -> None:
    model, x = network(features_only=True).eval(), torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            maps = model(x)
    for y, z in zip(maps, expected, strict=True):
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert relative_rms(y, z) <= 4 * torch.finfo(dtype).eps


def test_gradient_scaler() -> None:
    model, x = network().train(), torch.randn(4, 3, 65, 47)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("part", ["all", "a norm", "running statistics"])
def test_parameters_of_another_dtype_run_as_torch_has_them(part: str) -> None:
    block, x = mbconv(2, 3, 1, 16, 16).eval(), torch.randn(2, 16, 7, 9)
    if part == "all":
        block.bfloat16()
    elif part == "a norm":
        block.block[0][1].bfloat16()
    else:
        block.block[1][1].running_var = block.block[1][1].running_var.bfloat16()
        block.block[1][1].running_mean = block.block[1][1].running_mean.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        reason = ek.explain(block, x)[0].reason
        assert reason == "the native kernels compute with parameters in float32, not bfloat16"
        if part != "running statistics":
            with ek.use_backend("torch"):
                expected = block(x)
            # With one norm in bfloat16, the convolutions without it still run on kernels.
            assert_close(block(x), expected, 0.0 if part == "all" else torch.finfo(torch.bfloat16).eps)
        with ek.use_backend("cpu"), pytest.raises(BackendError, match="with parameters in float32, not bfloat16"):
            block(x)


# Single operators


def test_operators_cast_no_maps() -> None:
    weight, vector = torch.randn(8, 1, 3, 3), torch.rand(8)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "depthwise_conv": lambda x: ops.depthwise_conv(x, weight, 1, 1)[0],
        "pointwise_conv": lambda x: ops.pointwise_conv(x, torch.ones(4, 8, 1, 1))[0],
        "squeeze_excite": lambda x: ops.squeeze_excite(x, torch.ones(2, 8), None, torch.ones(8, 2), None),
        "bn_act_add": lambda x: ops.bn_act_add(x, Prologue(vector, vector, "silu"), x, None),
        "depthwise_conv_bn_silu": lambda x: ops.depthwise_conv_bn_silu(
            x, weight, vector, vector, vector, vector, padding=1
        ),
    }
    for name, call in calls.items():
        results = []
        for enabled in (False, True):
            x = torch.linspace(-2.0, 2.0, 2 * 8 * 7 * 9).view(2, 8, 7, 9).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = call(x)
                y.square().sum().backward()
            results.append((y, x.grad))
        for plain, cast in zip(*results, strict=True):
            assert torch.equal(plain, cast), name
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x.detach().bfloat16()).dtype == torch.bfloat16, name


# Models in bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("features_only", [True, False])
def test_models_in_bfloat16_run_in_channels_last(
    memory_format: torch.memory_format, features_only: bool, training: bool
) -> None:
    model = network(features_only=features_only).bfloat16().train(training)
    x = torch.randn(2, 3, 65, 47).bfloat16().contiguous(memory_format=memory_format)
    eager, exact, seen = copy.deepcopy(model), copy.deepcopy(model).double(), []
    model.features[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        actual = model(x)
        with ek.use_backend("torch"):
            expected, right = eager(x), exact(x.double())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert {row.backend for row in ek.explain(model, x)} == {"torch"}
    maps = zip(actual, expected, right, strict=True) if features_only else [(actual, expected, right)]
    for y, z, w in maps:
        assert y.dtype == torch.bfloat16
        assert not features_only or y.is_contiguous(memory_format=memory_format)
        assert relative_rms(y, w) <= 2 * relative_rms(z, w)


def test_a_forced_backend_leaves_models_in_bfloat16_as_they_were() -> None:
    model, x = network().bfloat16().eval(), torch.randn(2, 3, 65, 47).bfloat16()
    seen = []
    model.features[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    with ek.use_backend("torch"):
        model(x)
    assert seen == [True]
    with ek.use_backend("cpu"), pytest.raises(BackendError, match="compute in float32, not bfloat16"):
        model(x)


@pools_memory
def test_a_cast_map_reuses_memory() -> None:
    x, addresses = torch.randn(2, 64, 56, 56), []
    for _ in range(2):
        y = cast_map(x, torch.bfloat16)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, x.bfloat16())
        addresses.append(y.data_ptr())
        del y
    assert addresses[0] == addresses[1]
