"""Blocks on the operators against the eager block: forward, every gradient, running statistics."""

import copy
from functools import partial

import block_cases
import pytest
import torch
from conftest import TOLERANCES, assert_buffers_close, assert_close, assert_gradients_close, randomize, traces_operators
from torch import nn

import effnet_kernels as ek
from effnet_kernels.backends import select
from effnet_kernels.fusion.spec import ACTIVATIONS
from effnet_kernels.modules import ConvBnAct

pytestmark = pytest.mark.usefixtures("one_thread")


def mbconv(expand=4, kernel=3, stride=1, inputs=8, outputs=8, probability=0.0, norm_layer=nn.BatchNorm2d, **settings):
    config = ek.MBConvConfig(expand, kernel, stride, inputs, outputs, 1, **settings)
    return randomize(ek.MBConv(config, probability, norm_layer))


def fused(expand=4, kernel=3, stride=1, inputs=8, outputs=8, probability=0.0, norm_layer=nn.BatchNorm2d, **settings):
    config = ek.FusedMBConvConfig(expand, kernel, stride, inputs, outputs, 1, **settings)
    return randomize(ek.FusedMBConv(config, probability, norm_layer))


BLOCKS = {
    "residual": partial(mbconv),
    "no expansion": partial(mbconv, expand=1),
    "strided, kernel 5": partial(mbconv, kernel=5, stride=2, outputs=16),
    "kernel 7": partial(mbconv, kernel=7),
    "without excitation": partial(mbconv, squeeze_ratio=None, activation="relu6"),
    "same padding": partial(mbconv, stride=2, outputs=16, padding="same"),
    "stochastic depth": partial(mbconv, probability=0.5),
    "certain drop": partial(mbconv, probability=1.0),
    "fused": partial(fused),
    "fused, no expansion": partial(fused, expand=1),
    "fused, strided, same padding": partial(fused, stride=2, outputs=16, padding="same"),
    "fused, stochastic depth": partial(fused, probability=0.5),
    "dense convolution": lambda: randomize(nn.Sequential(ConvBnAct(8, 16, 3, 2))),
    "pointwise convolution": lambda: randomize(nn.Sequential(ConvBnAct(8, 16, 1))),
}


def run(block, x, backend):
    """Output, input gradient and the block after a step, from one seed."""
    block = copy.deepcopy(block)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with ek.use_backend(backend):
        y = block(x)
    y.mul(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad, block


@pytest.mark.parametrize("size", [(9, 7), (4, 4), (14, 15)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_operators_equal_the_textbook_block(name, training, size):
    block = BLOCKS[name]().double().train(training)
    x = torch.randn(3, 8, *size, dtype=torch.float64)
    y, grad, ours = run(block, x, "reference")
    expected, expected_grad, theirs = run(block, x, "torch")
    assert_close(y, expected)
    assert_close(grad, expected_grad)
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert ((p.grad - q.grad).abs() <= TOLERANCES[torch.float64] * (1 + p.grad.abs())).all(), key
    assert_buffers_close(ours, theirs, TOLERANCES[torch.float64])


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a != "none"])
def test_every_activation(act):
    block = mbconv(activation=act).train()
    x = torch.randn(3, 8, 9, 9)
    y, grad, ours = run(block, x, "reference")
    expected, expected_grad, theirs = run(block, x, "torch")
    assert_close(y, expected)
    assert_close(grad, expected_grad)
    assert_gradients_close(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_momentum_and_counts(backend, momentum):
    block = mbconv(norm_layer=partial(nn.BatchNorm2d, momentum=momentum)).train()
    eager = copy.deepcopy(block)
    for step in range(3):
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(step))
        with ek.use_backend(backend):
            block(x)
        with ek.use_backend("torch"):
            eager(x)
    assert int(block.block[0][1].num_batches_tracked) == 3 + 0
    assert_buffers_close(block, eager)


TRACED = pytest.param(True, marks=traces_operators)


@pytest.mark.parametrize("compiled", [False, TRACED])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_in_float64(momentum, compiled):
    block = mbconv(norm_layer=partial(nn.BatchNorm2d, momentum=momentum)).train().double()
    eager = copy.deepcopy(block)
    torch.compiler.reset()
    layer = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    for _ in range(3):
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        with ek.use_backend("reference"), torch.no_grad():
            layer(x)
        with ek.use_backend("torch"):
            eager(x)
    assert_buffers_close(block, eager, TOLERANCES[torch.float64])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["residual", "fused", "pointwise convolution"])
def test_the_reference_under_autocast(name, training):
    """Autocast casts the input once, and what the reference is made of no more."""
    block, x = BLOCKS[name]().train(training), torch.randn(2, 8, 9, 7)
    if name in ("residual", "fused"):
        # Another dtype than autocast's is torch's to add to.
        x = x.bfloat16()
    results = []
    for backend, enabled in (("reference", True), ("torch", True), ("torch", False)):
        copied, leaf = copy.deepcopy(block), (x if enabled else x.float()).clone().requires_grad_()
        with ek.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = copied(leaf)
        y.float().square().sum().backward()
        results.append([y.float(), leaf.grad, *(p.grad for p in copied.parameters())])
    for ours, theirs, right in zip(*results, strict=True):
        error, allowed = ((t - right).norm() / right.norm() for t in (ours, theirs))
        assert error <= max(2 * allowed, 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("compiled", [False, TRACED])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_running_statistics_of_nonfinite_batches(backend, skip, compiled):
    if select.available()[backend] is not None:
        pytest.skip(f"backend {backend}: {select.available()[backend]}")
    torch.compiler.reset()
    block_cases.check_nonfinite_batches(
        backend, lambda *size: torch.randn(size).contiguous(memory_format=torch.channels_last), skip, compiled
    )


@pytest.mark.parametrize("training", [True, False])
def test_untracked_statistics(training):
    block = mbconv(norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)).train(training)
    x = torch.randn(2, 8, 6, 6)
    with ek.use_backend("torch"):
        expected = block(x)
    with ek.use_backend("reference"):
        assert_close(block(x), expected)


def test_frozen_norms_in_a_training_model():
    block = mbconv(probability=0.5).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    block.block[0][1].train()
    x = torch.randn(2, 8, 6, 6)
    y, grad, ours = run(block, x, "reference")
    expected, expected_grad, theirs = run(block, x, "torch")
    assert_close(y, expected)
    assert_close(grad, expected_grad)
    assert_gradients_close(ours, theirs)
    assert_buffers_close(ours, theirs)
    assert torch.equal(ours.block[1][1].running_mean, block.block[1][1].running_mean)


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu"])
def test_outputs_come_in_the_inputs_memory_format(backend):
    if select.available()[backend] is not None:
        pytest.skip(f"backend {backend}: {select.available()[backend]}")
    block = mbconv(stride=2, outputs=16).eval()
    x = torch.randn(2, 8, 6, 6)
    with ek.use_backend(backend), torch.no_grad():
        assert block(x).is_contiguous()
        assert block(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def unknown_parts():
    def group_norm():
        return mbconv(norm_layer=lambda channels: nn.GroupNorm(4, channels))

    def edited(edit):
        def build():
            block = mbconv()
            edit(block)
            return block

        return build

    def weight_norm(block):
        nn.utils.parametrizations.weight_norm(block.block[0][0])

    return {
        "GroupNorm": group_norm,
        "SELU": edited(lambda b: b.block[0].__setitem__(2, nn.SELU())),
        "Identity": edited(lambda b: b.block.__setitem__(2, nn.Identity())),
        "Tanh": edited(lambda b: setattr(b.block[2], "scale_activation", nn.Tanh())),
        "hook": edited(lambda b: b.block[1][0].register_forward_hook(lambda *a: None)),
        "Parametrized": edited(weight_norm),
        "forward replaced": edited(lambda b: setattr(b.block[0][0], "forward", b.block[0][0].forward)),
        "padding mode": edited(lambda b: setattr(b.block[1][0], "padding_mode", "reflect")),
    }


@pytest.mark.parametrize("name", unknown_parts())
def test_what_the_operators_do_not_know_takes_the_module_path_and_says_so(name):
    block = unknown_parts()[name]().eval()
    x = torch.randn(2, 8, 6, 6)
    with ek.use_backend("reference"):
        (row,) = ek.explain(block, x)
        assert row.backend == "torch"
        assert name in row.reason
        if name != "padding mode":
            assert torch.equal(block(x), block.block(x) + x)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_hooks_on_inner_modules_fire(register, backend):
    block, fired = mbconv().train(), []
    for name, module in block.named_modules():
        # A full backward hook and an in-place activation behind it exclude each other in torch itself.
        before_norm = isinstance(module, nn.Conv2d) and module.bias is None
        if before_norm or (name and "backward" not in register):
            getattr(module, register)(lambda *args, name=name: fired.append(name))
    with ek.use_backend(backend):
        block(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()
    assert {"block.0.0", "block.1.0", "block.3.0"} <= set(fired)


def test_a_global_hook_fires_for_inner_modules():
    block, fired = mbconv().eval(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: fired.add(type(module)))
    try:
        with ek.use_backend("reference"):
            block(torch.randn(2, 8, 6, 6))
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.BatchNorm2d} <= fired


def test_stochastic_depth_draws_as_torchvision_does():
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision, the extra 'third-party'")
    x = torch.randn(64, 3, 2, 2)
    for mode in ("row", "batch"):
        torch.manual_seed(3)
        expected = tv_ops.StochasticDepth(0.3, mode).train()(x)
        torch.manual_seed(3)
        assert torch.equal(ek.StochasticDepth(0.3, mode).train()(x), expected)
        torch.manual_seed(3)
        factors = ek.StochasticDepth(0.3, mode).train().drop_path_scale(x)
        assert torch.equal(x * factors[:, None, None, None], expected)
    assert torch.equal(ek.StochasticDepth(0.3).eval()(x), x)
