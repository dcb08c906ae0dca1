"""Recipes and their values: what they resolve to, what is refused, and the rates of each step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import RMSpropTF
from torch import nn

from effnet_kernels import efficientnet_b0
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.train.config import Config, Schedule, parse_settings, read_config
from effnet_kernels.train.module import ImageClassifier
from effnet_kernels.train.recipes import DATA_SETS, RECIPES, resolve


def classifier(config: Config, batches: int = 10) -> ImageClassifier:
    """The module of a configuration, with a trainer that has one process."""
    module = ImageClassifier(config, 3, batches)
    module.trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("data", [*DATA_SETS, "photographs"])
def test_a_resolved_configuration_repeats_itself(recipe: str, data: str, tmp_path: Path) -> None:
    # TOML has no None.
    settings = parse_settings(["network.weights=none", "training.clip=none", "optimizer.momentum=none"])
    config = resolve({"data": {"name": data}, **settings}, recipe)
    assert config.network.weights is config.training.clip is config.optimizer.momentum is None
    (tmp_path / "config.toml").write_text(config.to_toml())
    values = read_config(tmp_path / "config.toml")
    assert values.pop("recipe") == recipe
    assert resolve(values, recipe) == config


def test_the_data_set_and_the_user_override_the_recipe() -> None:
    digits = resolve({})
    assert digits.recipe == "cifar"
    assert not digits.augmentation.flip
    assert resolve({"data": {"name": "cifar10"}}).augmentation.flip
    assert resolve({"augmentation": {"flip": True}}).augmentation.flip
    assert resolve({"data": {"name": "photographs"}}).recipe == "modern"


def test_sizes_come_from_the_network_or_its_weights() -> None:
    b3 = resolve({"data": {"name": "photographs"}, "network": {"name": "efficientnet_b3"}})
    assert (b3.data.image_size, b3.data.resize) == (300, 320)
    lite = resolve({"data": {"name": "photographs"}, "network": {"name": "efficientnet_lite1"}}, "finetune")
    # Those weights need SAME padding, and so does the network that a run is opened with.
    assert lite.network.name == "tf_efficientnet_lite1"
    assert (lite.data.image_size, lite.data.resize) == (240, 272)
    assert lite.data.mean == (127 / 255,) * 3
    assert resolve({"data": {"image_size": 64}}).data.resize == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": "x"}}, "optimizer.lr: .*valid number.*'x'"),
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr: .*greater than 0.*-1.0"),
        ({"optimizer": {"rate": 1.0}}, "optimizer.rate: there is no such value; expected one of name, lr"),
        ({"optimiser": {"lr": 1.0}}, "optimiser: there is no such value; expected one of recipe, network"),
        ({"optimizer": 3}, "optimizer: "),
        ({"augmentation": {"policy": "mirror"}}, "augmentation.policy: .*'randaugment'.*'mirror'"),
        ({"network": {"name": "efficientnet_b99"}}, "did you mean"),
        ({"network": {"weights": "V9"}}, "expected one of IMAGENET1K_V1"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(values)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of paper, modern, .*, got 'secret'"):
        resolve({}, "secret")


def test_settings_are_read_as_toml_or_as_text() -> None:
    settings = ["optimizer.lr=0.1", "optimizer.options.eps=1e-3", "network.weights=a/b.pth", "augmentation.flip=false"]
    assert parse_settings(settings) == {
        "optimizer": {"lr": 0.1, "options": {"eps": 1e-3}},
        "network": {"weights": "a/b.pth"},
        "augmentation": {"flip": False},
    }
    for text in ("lr=1", "optimizer.lr", "=1", ".lr=1"):
        with pytest.raises(ValueError, match=r"expected SECTION.NAME=VALUE"):
            parse_settings([text])


def test_an_option_of_the_optimizer_leaves_the_others() -> None:
    config = resolve(parse_settings(["optimizer.options.eps=0.5"]), "paper")
    assert config.optimizer.options == {"alpha": 0.9, "eps": 0.5}


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("lr = = 1")
    with pytest.raises(ValueError, match=r"a.toml: expected TOML"):
        read_config(tmp_path / "a.toml")


def test_rates_of_a_cosine() -> None:
    schedule = Schedule(epochs=10, warmup_epochs=2)
    assert [schedule.factor(epoch) for epoch in (0, 1, 2, 6, 10, 11)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_rates_of_the_paper() -> None:
    schedule = resolve({}, "paper").override({"schedule": {"epochs": 350}}).schedule
    assert schedule.factor(2.5) == pytest.approx(0.5)
    # Steps are counted from the first epoch, as the authors' code does.
    for epoch, steps in ((5.0, 2), (7.1, 2), (7.2, 3), (240.0, 100)):
        assert schedule.factor(epoch + 1e-9) == pytest.approx(0.97**steps)


def test_every_step_has_its_rate() -> None:
    config = resolve({"schedule": {"epochs": 2, "warmup_epochs": 1}, "training": {"accumulate": 2}})
    made = classifier(config).configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    # 10 batches an epoch, two of which are a step of 128 images.
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = config.optimizer.lr
    assert rates[:5] == pytest.approx([peak * (step + 0.5) / 5 for step in range(5)])
    assert rates[5:] == pytest.approx([peak * (1 + math.cos(math.pi * (step + 0.5) / 5)) / 2 for step in range(5)])


def test_the_optimizer_of_the_paper() -> None:
    module = classifier(resolve({"data": {"batch_size": 512}}, "paper"))
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is RMSpropTF
    assert {(group["alpha"], group["momentum"], group["eps"]) for group in optimizer.param_groups} == {(0.9, 0.9, 1e-3)}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {2 * 0.016}
    decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 1e-5}
    others = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0}
    for layer in module.network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert id(layer.weight) in decayed
            assert layer.bias is None or id(layer.bias) in others
        elif isinstance(layer, nn.BatchNorm2d):
            assert {id(layer.weight), id(layer.bias)} <= others
    assert len(decayed) + len(others) == len(list(module.network.parameters()))


def test_the_backbone_has_a_rate_of_its_own() -> None:
    module = classifier(resolve({"network": {"name": "efficientnet_lite0"}, "data": {"batch_size": 8}}, "finetune"))
    optimizer = module.configure_optimizers()["optimizer"]
    of_classifier = {id(p) for p in module.network.classifier.parameters()}
    for group in optimizer.param_groups:
        in_classifier = {id(p) in of_classifier for p in group["params"]}
        assert in_classifier == {group["initial_lr"] == 2e-3}
        assert group["initial_lr"] in (2e-3, pytest.approx(2e-4))


def test_progressive_learning() -> None:
    values = {"data": {"name": "photographs"}, "schedule": {"epochs": 8}, "augmentation": {"mixup": 0.3}}
    config = resolve(values, "v2")
    stages = [config.at_epoch(epoch) for epoch in range(8)]
    assert [stage.data.image_size for stage in stages] == [128, 128, 185, 185, 243, 243, 300, 300]
    assert [stage.augmentation.magnitude for stage in stages[::2]] == [5, 8, 12, 15]
    assert [stage.augmentation.mixup for stage in stages[::2]] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [stage.network.dropout for stage in stages[::2]] == pytest.approx([0.1, 0.1 + 0.2 / 3, 0.1 + 0.4 / 3, 0.3])
    # The network's own dropout, where no other is set.
    values["network"] = {"name": "efficientnet_b4", "dropout": None}
    stages = [resolve(values, "v2").at_epoch(epoch) for epoch in range(0, 8, 2)]
    assert [stage.network.dropout for stage in stages] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # Images are never larger at first.
    assert {resolve({}, "v2").at_epoch(epoch).data.image_size for epoch in range(10)} == {16}
    fixed = resolve({}, "modern")
    assert fixed.at_epoch(3) is fixed


def test_dropout_stochastic_depth_and_resolution_reach_the_network() -> None:
    values = {"dropout": 0.45, "stochastic_depth_prob": 0.1, "name": "efficientnet_b1", "low_resolution": True}
    network = classifier(resolve({"network": values})).network
    assert network.classifier[0].p == 0.45
    last = [m for m in network.modules() if type(m).__name__ == "StochasticDepth"][-1]
    assert 0 < last.p < 0.1
    assert network.features[0][0].stride == (1, 1)
    # The network's own.
    paper = classifier(resolve({}, "paper")).network
    own = efficientnet_b0(num_classes=3)
    assert paper.classifier[0].p == own.classifier[0].p == VARIANTS["efficientnet_b0"].dropout
    assert torch.equal(
        torch.tensor([m.p for m in paper.modules() if type(m).__name__ == "StochasticDepth"]),
        torch.tensor([m.p for m in own.modules() if type(m).__name__ == "StochasticDepth"]),
    )
