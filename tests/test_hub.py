"""Networks of the Hugging Face hub, from a cache in its layout: no test reaches the network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, calibrate
from safetensors.torch import save_file

import effnet_kernels as ek
from effnet_kernels.models.weights.hub import read_hub_network
from effnet_kernels.models.weights.pretrained import resolve_weights
from effnet_kernels.tools.cli import main

timm = pytest.importorskip("timm", reason="timm is not installed")
hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in the cache."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def store(cache: Path, name: str, file: str = "model.safetensors", classes: int = 7, **config: Any) -> Any:
    """Puts a network of timm's into the cache, as timm's push_to_hf_hub does; returns the network."""
    torch.manual_seed(0)
    network = calibrate(timm.create_model(name, num_classes=classes))
    folder = snapshot(cache, f"timm/{name}.test")
    settings = {**network.pretrained_cfg, **config.pop("pretrained_cfg", {})}
    described = {"architecture": name, "num_classes": classes, "pretrained_cfg": settings, **config}
    (folder / "config.json").write_text(json.dumps(described))
    if file.endswith(".safetensors"):
        save_file(network.state_dict(), folder / file)
    elif file:
        torch.save(network.state_dict(), folder / file)
    return network


# One of each kind: torch's and TensorFlow's padding and eps, deep networks whose released BatchNorms are others.
ARCHITECTURES = {
    "efficientnet_b0": "efficientnet_b0",
    "tf_efficientnet_b0": "tf_efficientnet_b0",
    "efficientnet_b5": "efficientnet_b5",
    "efficientnet_lite0": "efficientnet_lite0",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnetv2_s": "efficientnet_v2_s",
    "tf_efficientnetv2_b0": "tf_efficientnet_v2_b0",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_timms(architecture: str, cache: Path) -> None:
    theirs = store(cache, architecture)
    name = f"hf-hub:timm/{architecture}.test"
    ours = ek.create_model(ARCHITECTURES[architecture].removeprefix("tf_"), weights=name).eval()
    assert ours.num_classes == 7
    # In float64, in which another eps is not hidden by rounding.
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        assert_close(ours.double()(x), theirs.double()(x))
    # Prepared as timm prepares photographs.
    data = timm.data.resolve_data_config({}, model=theirs, use_test_size=True)
    transform = timm.data.create_transform(**data, is_training=False)
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    small = torch.randint(0, 256, (6, 9, 3), dtype=torch.uint8, generator=generator).numpy()
    photo = Image.fromarray(small).resize((430, 390), Image.Resampling.BICUBIC)
    assert torch.equal(resolve_weights(ARCHITECTURES[architecture], name).transforms()(photo), transform(photo))


def test_a_checkpoint_that_is_a_pickle(cache: Path) -> None:
    theirs = store(cache, "efficientnet_b0", "pytorch_model.bin")
    ours = ek.efficientnet_b0(weights="hf-hub:timm/efficientnet_b0.test", num_classes=7)
    assert torch.equal(ours.classifier[1].weight, theirs.classifier.weight)


def test_classes_and_settings_of_the_configuration(cache: Path) -> None:
    settings = {"input_size": [3, 32, 32], "test_input_size": [3, 48, 48], "crop_pct": 0.75, "mean": [0.1, 0.2, 0.3]}
    names = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "a cat"}}
    store(cache, "efficientnet_b0", classes=2, pretrained_cfg={**settings, "interpolation": "bilinear"}, **names)
    network = read_hub_network("hf-hub:timm/efficientnet_b0.test")
    assert network.classes == ["a cat", "n2"]
    assert (network.preprocess.crop_size, network.preprocess.resize_size) == (48, 64)
    assert network.preprocess.mean == (0.1, 0.2, 0.3)
    assert network.preprocess.interpolation == "bilinear"


def test_a_run_that_begins_with_them_keeps_their_settings(cache: Path) -> None:
    """Those that neither the variant nor the weights' file has."""
    from effnet_kernels.train.data import preprocess_of
    from effnet_kernels.train.module import build_network
    from effnet_kernels.train.recipes import resolve

    settings = {"crop_mode": "squash", "crop_pct": 0.5, "input_size": [3, 32, 32], "test_input_size": [3, 40, 40]}
    theirs = store(cache, "efficientnetv2_s", pretrained_cfg=settings)
    name = "hf-hub:timm/efficientnetv2_s.test"
    values = {"data": {"name": "photographs"}, "network": {"name": "efficientnet_v2_s", "weights": name}}
    config = resolve(values, "finetune")
    assert preprocess_of(config.data) == resolve_weights("efficientnet_v2_s", name).transforms()
    assert (config.data.image_size, config.data.resize, config.data.squash) == (40, 80, True)
    # As a run is opened: without the weights that it began with.
    network = build_network(config.override({"network": {"weights": None}}), 7).eval()
    ek.load_checkpoint(network, theirs.state_dict())
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        assert_close(network.double()(x), theirs.double()(x))


def test_predict_needs_no_model_beside_it(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    store(cache, "tf_efficientnet_b0", classes=2, label_names=["cat", "dog"])
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--weights", "hf-hub:timm/tf_efficientnet_b0.test", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {guess["class"] for guess in answer["predictions"]} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "expected an EfficientNet of the released ones, got 'resnet50'"),
        ({"architecture": "efficientnetv2_rw_s"}, "got 'efficientnetv2_rw_s'"),
        ({"architecture": None}, "got None"),
        ({"model_args": {"bn_eps": 1e-3, "act_layer": "relu"}}, r"arguments .* got \['act_layer'\]"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "got 'border' and 'bicubic'"),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "got 'center' and 'lanczos'"),
        ({"pretrained_cfg": {"input_size": [1, 28, 28], "test_input_size": None}}, r"the input size \[1, 28, 28\]"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], message: str, cache: Path) -> None:
    store(cache, "efficientnet_b0", "", **config)
    with pytest.raises(ValueError, match=f"hf-hub:timm/efficientnet_b0.test: .*{message}"):
        ek.efficientnet_b0(weights="hf-hub:timm/efficientnet_b0.test")


def test_what_is_not_there(cache: Path) -> None:
    with pytest.raises(OSError, match=r"hf-hub:timm/none: config.json was not found"):
        ek.efficientnet_b0(weights="hf-hub:timm/none")
    with pytest.raises(ValueError, match="expected hf-hub:USER/REPOSITORY, got 'hf-hub:none'"):
        ek.efficientnet_b0(weights="hf-hub:none")
    store(cache, "efficientnet_b0", "")
    # Without the network nobody knows that the usual file is not there.
    with pytest.raises(OSError, match=r"model.safetensors was not found"):
        ek.efficientnet_b0(weights="hf-hub:timm/efficientnet_b0.test")
    with pytest.raises(ValueError, match=r"expected those of efficientnet_b1, got .* of efficientnet_b0"):
        ek.efficientnet_b1(weights="hf-hub:timm/efficientnet_b0.test")
    snapshot(cache, "user/model").joinpath("config.json").write_text('{"model_type": "efficientnet"}')
    with pytest.raises(ValueError, match="expected a configuration of timm's"):
        ek.efficientnet_b0(weights="hf-hub:user/model")
