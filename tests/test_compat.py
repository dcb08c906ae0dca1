"""The interface of lukemelas's package: its names, its overrides, its checkpoints, its numbers."""

import pytest
import torch
from conftest import assert_close, randomize
from torch import nn

import effnet_kernels as ek
from effnet_kernels.models.weights.convert import load_checkpoint

# Half of B0's channels and blocks keep the tests quick.
CHEAP = {"width_coefficient": 0.5, "depth_coefficient": 0.4}


def third_party():
    return pytest.importorskip("efficientnet_pytorch", reason="compares with efficientnet_pytorch").EfficientNet


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def image(channels=3, size=224):
    # The other package pads for the size that a network was made for, whatever image comes.
    return torch.randn(1, channels, size, size)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_classes": 10},
        {"batch_norm_epsilon": 0.1, "batch_norm_momentum": 0.7},
        {"width_coefficient": 1.0, "depth_coefficient": 0.2},
        {"image_size": 224, "dropout_rate": 0.7, "drop_connect_rate": 0.5},
    ],
    ids=str,
)
def test_from_name_is_theirs(overrides):
    overrides = {**CHEAP, **overrides}
    theirs = randomize(third_party().from_name("efficientnet-b0", **overrides)).eval()
    ours = ek.EfficientNet.from_name("efficientnet-b0", **overrides).eval()
    load_checkpoint(ours, theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert [(n.eps, n.momentum) for n in norms(ours)] == [(n.eps, pytest.approx(n.momentum)) for n in norms(theirs)]
    x = image()
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
    assert ours.classifier[0].p == overrides.get("dropout_rate", 0.2)


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-b1", "efficientnet-b4", "efficientnet-b8"])
def test_names_are_theirs(name):
    with torch.device("meta"):
        theirs = third_party().from_name(name)
        ours = ek.EfficientNet.from_name(name)
    assert sorted(tuple(p.shape) for p in ours.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())
    assert {(n.eps, round(n.momentum, 6)) for n in norms(ours)} == {(1e-3, 0.01)}
    assert ours.classifier[0].p == theirs._dropout.p


def test_lite_names():
    with torch.device("meta"):
        assert sum(p.numel() for p in ek.EfficientNet.from_name("efficientnet-lite0").parameters()) == 4_652_008


def test_the_default_network_is_b0():
    theirs = randomize(third_party().from_name("efficientnet-b0")).eval()
    ours = ek.EfficientNet.from_name("efficientnet-b0").eval()
    load_checkpoint(ours, theirs.state_dict())
    x = image()
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


def test_drop_connect_rate_is_the_last_blocks_limit():
    theirs = third_party().from_name("efficientnet-b0", **CHEAP, drop_connect_rate=0.6)
    ours = ek.EfficientNet.from_name("efficientnet-b0", **CHEAP, drop_connect_rate=0.6)
    blocks = len(theirs._blocks)
    expected = [0.6 * index / blocks for index in range(blocks)]
    actual = [module.p for module in ours.modules() if isinstance(module, ek.StochasticDepth)]
    assert actual == pytest.approx(expected)


def test_include_top_false_gives_pooled_features():
    theirs = randomize(third_party().from_name("efficientnet-b0", **CHEAP)).eval()
    ours = ek.EfficientNet.from_name("efficientnet-b0", include_top=False, **CHEAP).eval()
    load_checkpoint(ours, theirs.state_dict())
    x = image()
    with torch.no_grad():
        assert_close(ours(x), theirs.extract_features(x).mean((2, 3)))


def test_from_name_keeps_the_callers_class_and_overrides():
    class Subclass(ek.EfficientNet):
        pass

    overrides = {**CHEAP, "num_classes": 3}
    model = Subclass.from_name("efficientnet-b0", 5, **overrides)
    assert type(model) is Subclass
    assert model(torch.randn(2, 5, 40, 40)).shape == (2, 3)
    assert overrides == {**CHEAP, "num_classes": 3}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_pretrained_with_a_file_is_theirs(suffix, tmp_path):
    theirs = randomize(third_party().from_name("efficientnet-b0", **CHEAP)).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="reads .safetensors")
        safetensors.save_file(theirs.state_dict(), path)
    again = ek.EfficientNet.from_pretrained("efficientnet-b0", weights_path=str(path), **CHEAP).eval()
    x = image()
    with torch.no_grad():
        assert_close(again(x), theirs(x))


def test_from_pretrained_leaves_a_new_classifier_and_stem_alone(tmp_path):
    theirs = randomize(third_party().from_name("efficientnet-b0", **CHEAP))
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    torch.manual_seed(5)
    fresh = ek.EfficientNet.from_name("efficientnet-b0", 1, num_classes=10, **CHEAP)
    torch.manual_seed(5)
    ours = ek.EfficientNet.from_pretrained("efficientnet-b0", str(path), in_channels=1, num_classes=10, **CHEAP)
    assert torch.equal(ours.classifier[1].weight, fresh.classifier[1].weight)
    assert torch.equal(ours.features[0][0].weight, fresh.features[0][0].weight)
    assert torch.equal(ours.features[0][1].running_mean, theirs._bn0.running_mean)
    assert torch.equal(ours.features[-1][0].weight, theirs._conv_head.weight)
    assert ours(torch.randn(2, 1, 40, 40)).shape == (2, 10)


@pytest.mark.parametrize("name", ["efficientnet-b9", "efficientnet_b0 ", "resnet50", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="expected the name of a variant, got"):
        ek.EfficientNet.from_name(name)


def test_unknown_overrides_are_refused():
    with pytest.raises(ValueError, match=r"override_params: expected .* got depth_divisors, widths"):
        ek.EfficientNet.from_name("efficientnet-b0", depth_divisors=8, widths=1)


@pytest.mark.parametrize(("name", "advprop"), [("efficientnet-l2", False), ("efficientnet-b8", False)])
def test_names_without_released_weights_are_refused_before_a_download(name, advprop):
    with torch.device("meta"), pytest.raises(ValueError, match=f"released weights .* got '{name}'"):
        ek.EfficientNet.from_pretrained(name, advprop=advprop)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(ek.EfficientNet.from_name("efficientnet-b0", **CHEAP).state_dict(), path)
    with pytest.raises(ValueError, match="expected"):
        ek.EfficientNet.from_pretrained("efficientnet-b0", str(path), width_coefficient=0.4, depth_coefficient=0.4)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "nothing.pth"
    with pytest.raises((ValueError, FileNotFoundError), match=r"nothing\.pth"):
        ek.EfficientNet.from_pretrained("efficientnet-b0", str(path), **CHEAP)
