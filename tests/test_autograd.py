"""A fused block is a module like any other: its outputs may be changed in place, and gradients may come in batches."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from block_cases import BLOCKS, THIRD_PARTY_BLOCKS
from conftest import TOLERANCES, assert_buffers_close, assert_close, assert_gradients_close, randomize
from native_cases import needs_native
from operator_arguments import recorded_outputs
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.fusion.spec import ACTIVATIONS, Epilogue, Prologue
from effnet_kernels.modules import FusedMBConv, FusedMBConvConfig, MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda y: y.add_(1.0),
    "mul_": lambda y: y.mul_(2.0),
    "relu_": lambda y: y.relu_(),
    "F.relu": lambda y: F.relu(y, inplace=True),
    "+=": lambda y: y.__iadd__(torch.ones(())),
    "index": lambda y: y.index_fill_(0, torch.tensor([0]), 0.0),
    "dropout": lambda y: F.dropout2d(y, 0.0, inplace=True) if y.dim() == 4 else F.dropout(y, 0.0, inplace=True),
    "a slice": lambda y: (y[:, :1].zero_(), y)[1],
    "copy_": lambda y: y.copy_(2 * y.detach()),
}


def calls() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    return BLOCKS | THIRD_PARTY_BLOCKS | {"head, pooled": (lambda: Pooled(BLOCKS["head"][0]()), BLOCKS["head"][1])}


class Pooled(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head.pooled(x)


def results(block: nn.Module, x: Tensor, change: Callable) -> tuple[list[Tensor], nn.Module]:
    """The output, changed, with the input's gradient, and the block with its own."""
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    torch.manual_seed(1)
    y = change(block(x))
    y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape))
    return [y, x.grad], block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", calls())
def test_outputs_may_be_changed_in_place(name: str, training: bool) -> None:
    builder, shape = calls()[name]
    block, x = randomize(builder()).train(training), torch.randn(shape)
    for what, change in IN_PLACE.items():
        with select.use_backend("torch"):
            (expected, expected_grad), theirs = results(block, x, lambda y, change=change: change(y.clone()))
        with select.use_backend("cpu"):
            (y, grad), ours = results(block, x, change)
        assert_close(y, expected)
        assert_close(grad, expected_grad)
        assert_gradients_close(ours, theirs)
        assert what


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", calls())
def test_outputs_are_no_views(name: str, mode: Callable) -> None:
    builder, shape = calls()[name]
    # A large map comes from a pool of memory, a small one does not.
    for size in (shape, (8, shape[1], 64, 64)):
        for training in (True, False):
            block, x = builder().train(training), torch.randn(size)
            with mode(), select.use_backend("cpu"):
                assert not block(x)._is_view()


def test_public_operators_return_no_views() -> None:
    x, w, taps = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(8, 8, 1, 1), torch.randn(8, 1, 3, 3)
    w1, w2, scale = torch.randn(4, 8), torch.randn(8, 4), torch.rand(8)
    pooled = torch.randn(2, 8, requires_grad=True)
    for input, features in ((x, pooled), (x.detach(), pooled.detach())):
        with select.use_backend("cpu"):
            outputs = [
                *ops.pointwise_conv(input, w, reduction="statistics"),
                *ops.depthwise_conv(input, taps, reduction="statistics"),
                ops.pointwise_conv(input.detach(), w, reduction="pool")[0],
                ops.depthwise_conv_bn_silu(input, taps, None, None, scale, scale, 1, 1),
                ops.excite(features, w1, None, w2, None),
                ops.squeeze_excite(input, w1, None, w2, None),
                ops.squeeze(input),
                ops.bn_act_add(input, Prologue(scale)),
                ops.channel_statistics(input.detach()),
            ]
        assert not any(y._is_view() for y in outputs)


def test_recorded_operators_run_on_the_kernels() -> None:
    with select.use_backend("cpu"):
        for name, y in recorded_outputs("cpu").items():
            assert type(y.grad_fn).__name__ == f"{name}Backward"


def surroundings() -> dict[str, Callable[[nn.Module], object]]:
    """What makes one block of a network run as torch has it, beside others that are fused."""
    return {
        "hook": lambda b: b.block[0].register_forward_hook(lambda *a: None),
        "GELU": lambda b: b.block[0].__setitem__(2, nn.GELU()),
        "GroupNorm": lambda b: b.block[0].__setitem__(1, nn.GroupNorm(4, b.block[0][1].num_features)),
        "weight_norm": lambda b: nn.utils.parametrizations.weight_norm(b.block[0][0]),
        "replaced forward": lambda b: setattr(b.block[0][0], "forward", b.block[0][0].forward),
    }


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", surroundings())
def test_networks_with_one_block_of_torchs_own_train(name: str, accelerated: bool) -> None:
    settings = [MBConvConfig(2, 3, 1, 8, 16, 1), MBConvConfig(2, 3, 1, 16, 16, 3)]
    if accelerated:
        from torchvision.models.efficientnet import EfficientNet
        from torchvision.models.efficientnet import MBConvConfig as Config

        model = EfficientNet([Config(2, 3, 1, 8, 16, 1, 1.0, 1.0), Config(2, 3, 1, 16, 16, 3, 1.0, 1.0)], 0.0, 0.0)
        model = ek.accelerate(model)
    else:
        model = ek.EfficientNet(settings, 0.0, 0.0)
    randomize(model).train()
    surroundings()[name](model.features[2][1])
    theirs, x = copy.deepcopy(model), torch.randn(2, 3, 33, 35)
    model(x).square().sum().backward()
    with select.use_backend("torch"):
        theirs(x).square().sum().backward()
    assert_gradients_close(model, theirs)


@pytest.mark.parametrize("activation", [act for act in ACTIVATIONS if act != "none"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_residual_behind_an_activation_that_saves_its_output(activation: str, backend: str) -> None:
    block = FusedMBConv(FusedMBConvConfig(1, 3, 1, 8, 8, 1, activation=activation), 0.0, nn.BatchNorm2d).train()
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    with select.use_backend(backend):
        block(x).sum().backward()
    assert x.grad is not None


def batches(y: Tensor, x: Tensor, parameters: list[Tensor]) -> dict[str, list[Tensor]]:
    """The gradients of five outputs' weights at once, by everything that hands in a batch of gradients."""
    grads = torch.linspace(-1, 1, 5 * y.numel()).reshape(5, *y.shape)
    inputs = [x, *parameters]

    def one(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, g, retain_graph=True)

    expected = [torch.stack(column) for column in zip(*(one(g) for g in grads), strict=True)]
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(one)(grads)
    second = torch.vmap(one, in_dims=1)(grads.transpose(0, 1))
    nested = torch.vmap(torch.vmap(one))(torch.stack([grads, grads]))
    return {
        "one by one": expected,
        "is_grads_batched": list(batched),
        "vmap": list(mapped),
        "vmap, second dimension": list(second),
        "vmap, nested": [g[1] for g in nested],
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", calls())
def test_batches_of_gradients(name: str, training: bool) -> None:
    builder, shape = calls()[name]
    block = randomize(builder()).train(training)
    x = torch.randn(shape, requires_grad=True)
    with select.use_backend("cpu"):
        found = batches(block(x), x, list(block.parameters()))
    for what, gradients in found.items():
        for g, right in zip(gradients, found["one by one"], strict=True):
            assert torch.equal(g, right), what


def test_batches_of_gradients_in_another_thread() -> None:
    """Autograd computes the gradients of a GPU in a thread of its own."""
    from torch._vmap_internals import _vmap

    from effnet_kernels.fusion.first_order import first_order

    def scaled(ctx: None, g: Tensor, factor: Tensor) -> tuple[Tensor, None]:
        return g * factor.sum(), None

    def elsewhere(g: Tensor) -> Tensor:
        with torch.no_grad(), ThreadPoolExecutor(1) as pool:
            # Grad mode is the thread's, too.
            found: Tensor = pool.submit(torch.no_grad()(first_order(scaled)), None, g, torch.ones(3)).result()[0]
        return found

    for grads in (torch.randn(5, 4), torch.randn(1, 4)):
        assert torch.equal(_vmap(elsewhere)(grads), grads * 3)
    grads = torch.randn(2, 5, 4)
    assert torch.equal(_vmap(_vmap(elsewhere))(grads), grads * 3)


def test_batches_of_gradients_of_the_public_operators() -> None:
    x, w, taps = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(8, 8, 1, 1), torch.randn(8, 1, 3, 3)
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4)
    parameters = [t.requires_grad_() for t in (w, taps, w1, w2)]
    with select.use_backend("cpu"):
        for function, own in (
            (lambda: ops.pointwise_conv(x, w)[0], [w]),
            (lambda: ops.pointwise_conv(x, w, reduction="statistics")[1], [w]),
            (lambda: ops.depthwise_conv(x, taps)[0], [taps]),
            (lambda: ops.squeeze_excite(x, w1, None, w2, None), [w1, w2]),
            (lambda: ops.excite(x.mean((2, 3)), w1, None, w2, None), [w1, w2]),
            (lambda: ops.squeeze(x, Prologue(w[0, :, 0, 0], None, "silu")), []),
            (lambda: ops.bn_act_add(x, Prologue(None, w[0, :, 0, 0], "silu")), []),
        ):
            found = batches(function(), x, own)
            for gradients in found.values():
                for g, right in zip(gradients, found["one by one"], strict=True):
                    assert_close(g, right)
    assert parameters


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_networks_jacobian(vectorize: bool) -> None:
    model = randomize(ek.EfficientNet([MBConvConfig(2, 3, 1, 8, 8, 1)], 0.0, 0.0, num_classes=3)).eval()
    x = torch.randn(1, 3, 9, 9)
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=vectorize)
    with select.use_backend("torch"):
        expected = torch.autograd.functional.jacobian(copy.deepcopy(model).double(), x.double())
    assert_close(jacobian, expected.float())


def penalised(block: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    """The output, its gradient, and the gradients of a loss of both."""
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    torch.manual_seed(1)
    with select.use_backend(backend):
        y = block(x)
        # BatchNorm would take the gradient of a plain sum of squares out again.
        weights = torch.linspace(-1, 1, y.numel()).sin().to(y.dtype).reshape(y.shape)
        (g,) = torch.autograd.grad((weights * y.square()).sum(), x, create_graph=True)
        (g.square().sum() + y.sum()).backward()
    return [y, g, x.grad, *(p.grad for p in block.parameters()), *(b.clone() for b in block.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in calls() if "hardswish" not in name])
def test_second_derivatives(name: str, training: bool) -> None:
    """A penalty on gradients; torch has no second derivative of hardsigmoid either."""
    builder, shape = calls()[name]
    # BatchNorms of few values magnify rounding.
    block, x = randomize(builder()).train(training), torch.randn(8, *shape[1:])
    found = penalised(block, x, "cpu")
    right = penalised(block.double(), x.double(), "torch")
    for ours, exact in zip(found, right, strict=True):
        assert_close(ours, exact.to(ours.dtype), 1e-4 if training else TOLERANCES[torch.float32])


def test_second_derivatives_are_those_of_the_forward_pass() -> None:
    """Statistics that move between it and the backward pass are not read."""
    block, x = randomize(BLOCKS["expand"][0]()).eval(), torch.randn(3, 16, 5, 5, requires_grad=True)
    gradients = []
    for moves in (False, True):
        y = block(x)
        if moves:
            with torch.no_grad():
                block.train()(torch.randn(8, 16, 5, 5) * 3)
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert_close(*gradients)


def test_a_networks_hessian() -> None:
    model = randomize(ek.EfficientNet([MBConvConfig(2, 3, 1, 8, 8, 1)], 0.0, 0.0, num_classes=3)).eval()
    x, found = torch.randn(1, 3, 5, 5), []
    for vectorize in (False, True):
        found.append(torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x, vectorize=vectorize))
    with select.use_backend("torch"):
        exact = copy.deepcopy(model).double()
        right = torch.autograd.functional.hessian(lambda x: exact(x).square().sum(), x.double()).float()
    for hessian in found:
        assert_close(hessian, right)


def test_second_derivatives_that_are_refused() -> None:
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    y = ops.squeeze(x)
    with pytest.raises(RuntimeError, match="a single operator has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    x = torch.randn(2, 40, 5, 5).bfloat16().requires_grad_()
    block = randomize(BLOCKS["head"][0]())
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    with pytest.raises(RuntimeError, match="whose input autocast casts has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("of_parameters", [False, True])
@pytest.mark.parametrize("training", [True, False])
# The activation of efficientnet_pytorch is a Function of its own without a forward derivative.
@pytest.mark.parametrize("name", [name for name in calls() if name != "efficientnet_pytorch"])
def test_forward_mode_keeps_the_tangent(name: str, training: bool, of_parameters: bool) -> None:
    builder, shape = calls()[name]
    block = randomize(builder()).train(training)
    for module in block.modules():
        # What is drawn, and statistics that move, would differ from call to call.
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = module.running_mean is not None and not training
        elif hasattr(module, "drop_prob") or type(module).__name__ == "StochasticDepth":
            module.eval()
    x, tangent = torch.randn(shape), torch.randn(shape)
    tangents = {key: torch.randn_like(p) for key, p in block.named_parameters()} if of_parameters else {}

    def tangent_of(block: nn.Module, dtype: torch.dtype) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual
            given = {key: dual(block.get_parameter(key).detach(), t.to(dtype)) for key, t in tangents.items()}
            y = torch.func.functional_call(block, given, (dual(x.to(dtype), tangent.to(dtype)),))
            found = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert found is not None
        return found

    with torch.no_grad():
        ours = tangent_of(block, torch.float32)
        assert_close(ours, tangent_of(copy.deepcopy(block).double(), torch.float64).float())


def test_forward_mode_through_a_frozen_engine() -> None:
    model = randomize(ek.EfficientNet([MBConvConfig(2, 3, 1, 8, 8, 1)], 0.0, 0.0, num_classes=3)).eval()
    x, tangent = torch.randn(1, 3, 9, 9), torch.randn(1, 3, 9, 9)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        ours = torch.autograd.forward_ad.unpack_dual(ek.freeze(model)(dual)).tangent
    expected = torch.func.jvp(copy.deepcopy(model).double(), (x.double(),), (tangent.double(),))[1]
    assert_close(ours, expected.float())


AFFINES = [(scale, shift, act) for scale in (0, 1) for shift in (0, 1) for act in ("none", "silu", "relu", "hardswish")]


@pytest.mark.parametrize(("scale", "shift", "act"), AFFINES)
def test_prologues_with_any_part_missing(scale: int, shift: int, act: str) -> None:
    """Forward and every gradient of each operator, for each subset of a prologue, against the reference in float64."""
    x, residual = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    w, taps = torch.randn(16, 8, 1, 1), torch.randn(8, 1, 3, 3)
    s = torch.rand(8) + 0.5 if scale else None
    t = torch.randn(8) if shift else None
    operators: list[Callable] = [
        lambda x, s, t: ops.pointwise_conv(x, w.to(x), None, Prologue(s, t, act))[0],
        lambda x, s, t: ops.depthwise_conv(x, taps.to(x), 1, 1, Prologue(s, t, act))[0],
        lambda x, s, t: ops.squeeze(x, Prologue(s, t, act)),
        lambda x, s, t: ops.bn_act_add(x, Prologue(s, t, act), residual.to(x), None),
    ]
    for operator in operators:
        outcomes = []
        for dtype in (torch.float32, torch.float64):
            inputs = [None if v is None else v.detach().to(dtype).requires_grad_() for v in (x, s, t)]
            y = operator(*inputs)
            y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape))
            outcomes.append([y, *(v.grad for v in inputs if v is not None)])
        for ours, right in zip(*outcomes, strict=True):
            assert_close(ours, right.float())


@pytest.mark.parametrize("outputs", [7, 8, 16, 33])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_reductions_beside_residuals_and_gradients(
    outputs: int, with_residual: bool, reduction: str, with_gradients: bool
) -> None:
    x, w, taps = torch.randn(2, 8, 5, 6), torch.randn(outputs, 8, 1, 1), torch.randn(8, 1, 3, 3)
    residual = torch.randn(2, outputs, 5, 6) if with_residual else None
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        inputs = [v.detach().to(dtype).requires_grad_(with_gradients) for v in (x, w, taps)]
        epilogue = None if residual is None else Epilogue(None, None, "silu", residual.to(dtype))
        found = [
            *ops.pointwise_conv(inputs[0], inputs[1], None, None, epilogue, reduction),
            *ops.depthwise_conv(inputs[0], inputs[2], 1, 1, None, None, reduction),
        ]
        found = [y for y in found if y is not None]
        if with_gradients:
            sum((y * torch.linspace(-1, 1, y.numel()).to(y).reshape(y.shape)).sum() for y in found).backward()
            found += [v.grad for v in inputs]
        outcomes.append(found)
    for ours, right in zip(*outcomes, strict=True):
        assert_close(ours, right.float())


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act not in ("none", "silu")])
def test_derivatives_at_kinks_and_at_nan_are_torchs(act: str) -> None:
    # One number at a time: torch's own vectorised loops have other derivatives at NaN than its scalar ones.
    for value in (-3.0, 0.0, 3.0, 6.0, float("nan"), -4.0, 1.5, 7.0):
        z = torch.full((1, 1, 1, 1), value, requires_grad=True)
        getattr(F, act)(z).backward(torch.ones(1, 1, 1, 1))
        x = torch.full((1, 8, 1, 1), value, requires_grad=True)
        with select.use_backend("cpu"):
            ops.bn_act_add(x, Prologue(act=act)).backward(torch.ones(1, 8, 1, 1))
        assert torch.equal(x.grad.flatten(), z.grad.flatten().expand(8)), value


@pytest.mark.parametrize("momentum", [1.0, 0.999, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_at_any_momentum(momentum: float, compiled: bool) -> None:
    """At a momentum of 1 nothing of the statistics before may be left."""
    block = randomize(BLOCKS["expand"][0]()).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
            norm.running_mean.fill_(1e4)
            norm.running_var.fill_(1e6)
    exact, x = copy.deepcopy(block).double(), torch.randn(3, 16, 15, 17)
    torch._dynamo.reset()
    with select.use_backend("cpu"):
        (torch.compile(block, backend="aot_eager") if compiled else block)(x)
    with select.use_backend("torch"):
        exact(x.double())
    # One minus a momentum of 0.999 is off by 1e-5 in float32.
    assert_buffers_close(block, exact, 3e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autograd_sees_of_running_statistics_what_it_does_in_torch(backend: select.Backend) -> None:
    """torch's batch_norm moves them without a new version; a pass of torch's that has saved them wants the old one."""
    block, x = randomize(BLOCKS["no expand, residual"][0]()).train(), torch.randn(2, 24, 7, 7)
    # Of other strides, too.
    block.block[0][1].running_mean = torch.randn(24, 2)[:, 0]
    eager, moved = copy.deepcopy(block), []
    for each, name in ((block, backend), (eager, "torch")):
        before = [b._version for b in each.buffers()]
        with select.use_backend(name):
            each(x)
        moved.append([b._version - version for b, version in zip(each.buffers(), before, strict=True)])
    assert moved[0] == moved[1]
    with select.use_backend("torch"):
        penalty = torch.autograd.grad(block(x).square().sum(), block.block[0][0].weight, create_graph=True)[0].sum()
    with select.use_backend(backend):
        (penalty + block(x).sum()).backward()
    for p, buffer in zip(block.parameters(), block.buffers(), strict=False):
        assert p.grad.isfinite().all()
        assert buffer.isfinite().all()
