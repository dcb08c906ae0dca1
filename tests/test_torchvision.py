"""The same network as torchvision's: keys, initial weights, outputs, gradients, running statistics."""

import copy

import pytest
import torch
from conftest import (
    TOLERANCES,
    assert_buffers_close,
    assert_close,
    assert_gradients_close,
    randomize,
    relative_rms,
)

import effnet_kernels as ek

tv = pytest.importorskip("torchvision.models", reason="compares with torchvision, the extra 'third-party'")

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["efficientnet_b0", "efficientnet_v2_s"]
LARGE = [f"efficientnet_b{i}" for i in range(1, 8)] + ["efficientnet_v2_m", "efficientnet_v2_l"]


def pair(name, **kwargs):
    """torchvision's network and ours, each from the same seed."""
    torch.manual_seed(0)
    theirs = getattr(tv, name)(**kwargs)
    torch.manual_seed(0)
    return theirs, getattr(ek, name)(**kwargs)


def step(model, x):
    """One forward and backward from one seed; the output."""
    torch.manual_seed(1)
    y = model(x)
    y.square().mean().backward()
    return y.detach()


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_keys_initial_weights_and_outputs(name):
    theirs, ours = pair(name)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    for (key, a), (_, b) in zip(theirs.named_modules(), ours.named_modules(), strict=False):
        if isinstance(a, torch.nn.BatchNorm2d):
            assert (a.eps, a.momentum) == (b.eps, b.momentum), key
    depths = [m.p for m in theirs.modules() if type(m).__name__ == "StochasticDepth"]
    assert depths == [m.p for m in ours.modules() if isinstance(m, ek.StochasticDepth)]
    assert theirs.classifier[0].p == ours.classifier[0].p

    ours.load_state_dict(randomize(theirs).state_dict())
    x = torch.randn(2, 3, 33, 47)
    with torch.inference_mode():
        expected = theirs.eval()(x)
        for backend in ("torch", "reference", None):
            if backend is None:
                assert_close(ours.eval()(x), expected)
            else:
                with ek.use_backend(backend):
                    assert_close(ours.eval()(x), expected)


@pytest.mark.parametrize("name", LARGE)
def test_a_training_step_of_the_large_ones(name):
    # The default path, at a resolution that leaves the last BatchNorms eight values a channel. They amplify rounding:
    # the measure is by what torchvision's differs from float64.
    theirs, ours = pair(name)
    x = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(theirs).double().train()
    right, y, expected = step(exact, x.double()), step(ours.train(), x), step(theirs.train(), x)
    assert relative_rms(y, right) <= 2 * relative_rms(expected, right)
    for p, q, r in zip(exact.parameters(), ours.parameters(), theirs.parameters(), strict=True):
        allowed = 4 * float((r.grad - p.grad).norm()) + 1e-4 * float(p.grad.norm())
        assert float((q.grad - p.grad).norm()) <= allowed
    # The amplified rounding reaches the running statistics: 1e-4 of a variance in efficientnet_v2_l.
    assert_buffers_close(ours, theirs, 1e-3)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("efficientnet_b0", "torch"), ("efficientnet_v2_s", "torch"), ("efficientnet_b0", "reference")],
)
@pytest.mark.parametrize("size", [(96, 96), (97, 111)])
def test_a_training_step_equals_torchvisions(name, backend, size):
    theirs, ours = pair(name)
    x = torch.randn(4, 3, *size)
    with ek.use_backend(backend):
        y = step(ours.train(), x)
    assert_close(y, step(theirs.train(), x))
    assert_gradients_close(ours, theirs)
    assert_buffers_close(ours, theirs)


def small_pair():
    """A network of every kind of block, small enough for float64, and torchvision's of the same configuration."""
    rows = [
        ("fused", 1, 3, 1, 8, 8, 1),
        ("fused", 4, 3, 2, 8, 16, 2),
        ("mb", 4, 3, 2, 16, 24, 2),
        ("mb", 6, 5, 2, 24, 24, 2),
    ]
    models = []
    for package in (tv.efficientnet, ek):
        kinds = {"fused": package.FusedMBConvConfig, "mb": package.MBConvConfig}
        torch.manual_seed(0)
        settings = [kinds[kind](*row) for kind, *row in rows]
        models.append(package.EfficientNet(settings, 0.2, stochastic_depth_prob=0.5, num_classes=8).double().train())
    return models


def test_operators_in_float64_equal_torchvision():
    # In float64 a difference in meaning shows, and the rounding that deep BatchNorms amplify does not.
    theirs, ours = small_pair()
    x = torch.randn(4, 3, 33, 47, dtype=torch.float64)
    with ek.use_backend("reference"):
        y = step(ours, x)
    assert_close(y, step(theirs, x))
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert ((p.grad - q.grad).abs() <= TOLERANCES[torch.float64] * (1 + p.grad.abs())).all(), name
    assert_buffers_close(ours, theirs, TOLERANCES[torch.float64])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_seed_gives_one_training_run(backend):
    x, target = torch.randn(8, 3, 64, 64, dtype=torch.float64), torch.arange(8)
    losses = []
    for model in small_pair():
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run = []
        for _ in range(5):
            with ek.use_backend(backend):
                loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCES[torch.float64])


def test_torchvisions_arguments():
    theirs, ours = pair(
        "efficientnet_b0", num_classes=7, dropout=0.4, stochastic_depth_prob=0.1, norm_layer=torch.nn.InstanceNorm2d
    )
    x = torch.randn(2, 3, 64, 64)
    assert_close(ours.eval()(x), theirs.eval()(x))
    setting = [ek.MBConvConfig(1, 3, 1, 32, 16, 1), ek.FusedMBConvConfig(4, 3, 2, 16, 24, 2)]
    theirs_setting = [
        tv.efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1),
        tv.efficientnet.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
    ]
    torch.manual_seed(0)
    theirs = tv.EfficientNet(theirs_setting, 0.1, last_channel=48)
    torch.manual_seed(0)
    ours = ek.EfficientNet(setting, 0.1, last_channel=48)
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_block_of_the_users_own_is_built_with_torchvisions_three_arguments():
    class Block(torch.nn.Module):
        def __init__(self, cnf, stochastic_depth_prob, norm_layer):
            super().__init__()
            self.conv = torch.nn.Conv2d(cnf.input_channels, cnf.out_channels, 1, cnf.stride)

        def forward(self, x):
            return self.conv(x)

    model = ek.EfficientNet([ek.MBConvConfig(1, 3, 2, 8, 16, 2, block=Block)], 0.0, num_classes=5)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
