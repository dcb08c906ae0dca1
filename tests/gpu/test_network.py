"""A whole B0 (fewer blocks, small images) on the Triton kernels against the eager path."""

import copy

import pytest
import torch
from conftest import assert_buffers_close, assert_gradients_close, randomize
from torch import nn

from effnet_kernels import EfficientNet
from effnet_kernels.backends import select
from effnet_kernels.models.variants import VARIANTS
from gpu.compare import assert_accurate, channels_last


def trimmed_b0() -> EfficientNet:
    """B0 with one block a stage, two in the third, so that there are residuals; 10 classes."""
    settings = VARIANTS["efficientnet_b0"].block_configs()
    for index, config in enumerate(settings):
        config.num_layers = 2 if index == 2 else 1
    return randomize(EfficientNet(settings, 0.0, num_classes=10)).cuda()


def logits_and_loss(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, backend: str) -> tuple:
    torch.manual_seed(1)
    with select.use_backend(backend):
        logits = model(x)
    return logits, nn.functional.cross_entropy(logits, labels)


def test_training_pass() -> None:
    model = trimmed_b0()
    exact = copy.deepcopy(model).double()
    x, labels = channels_last(2, 3, 64, 64), torch.tensor([1, 7], device="cuda")
    logits, loss = logits_and_loss(model, x, labels, "triton")
    expected, expected_loss = logits_and_loss(exact, x.double(), labels, "torch")
    loss.backward()
    expected_loss.backward()
    assert_accurate(logits.detach(), expected.detach())
    assert_gradients_close(model.double(), exact)
    assert_buffers_close(model, exact)


def test_inference() -> None:
    model = trimmed_b0().eval()
    x = channels_last(2, 3, 64, 64)
    with torch.no_grad():
        with select.use_backend("triton"):
            logits = model(x)
            contiguous = model(x.contiguous())
        with select.use_backend("torch"):
            expected = copy.deepcopy(model).double()(x.double())
    assert_accurate(logits, expected)
    assert torch.equal(logits, contiguous)


def test_five_steps_have_the_eager_losses() -> None:
    losses = {}
    # Its last map has enough pixels that no channel's variance is near zero: such channels turn rounding into chaos.
    settings = VARIANTS["efficientnet_b0"].block_configs()[:3]
    for config, layers in zip(settings, (1, 1, 2), strict=True):
        config.num_layers = layers
    start = randomize(EfficientNet(settings, 0.0, stochastic_depth_prob=0.2, num_classes=10)).cuda()
    x, labels = channels_last(4, 3, 40, 40), torch.tensor([1, 7, 3, 3], device="cuda")
    for backend in ("triton", "torch"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses[backend] = []
        for _ in range(5):
            optimizer.zero_grad()
            _, loss = logits_and_loss(model, x, labels, backend)
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["torch"][-1] < losses["torch"][0]
