"""The tables: every variant against what is known of it, and against timm's."""

import pytest
import torch
from conftest import assert_close
from torch import nn

import effnet_kernels as ek
from effnet_kernels.models.variants import find_variant

PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_v2_s": 21_458_488,
    "efficientnet_v2_m": 54_139_356,
    "efficientnet_v2_l": 118_515_272,
    "efficientnet_lite0": 4_652_008,
}


def on_meta(builder, **kwargs):
    with torch.device("meta"):
        return builder(**kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert sum(p.numel() for p in on_meta(getattr(ek, name)).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ek.VARIANTS)
def test_same_shapes_and_settings_as_timms(name):
    timm = pytest.importorskip("timm", reason="compares with timm, the extra 'third-party'")
    plain = name.removeprefix("tf_").replace("efficientnet_v2_", "efficientnetv2_")
    # timm has V2-B only as TensorFlow's.
    tensorflow = name.startswith("tf_") or "v2_b" in name
    theirs = on_meta(lambda: timm.create_model(f"tf_{plain}" if tensorflow else plain))
    ours = on_meta(getattr(ek, name))

    def shapes(model):
        return sorted(tuple(p.shape) for p in model.parameters())

    assert shapes(ours) == shapes(theirs)

    def convolutions(model):
        return [(m.kernel_size, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)]

    assert convolutions(ours) == convolutions(theirs)
    kinds = {type(m).__name__ for m in ours.modules()}
    assert ("ReLU6" in kinds) == ("lite" in name)
    assert ("SqueezeExcitation" in kinds) == ("lite" not in name)
    assert ("Conv2dSame" in kinds) == name.startswith("tf_")
    if name.startswith("tf_"):
        norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_every_variant_has_a_builder_of_its_name():
    for name in ek.VARIANTS:
        builder = getattr(ek, name)
        assert builder.__name__ == name
        assert name in ek.__all__
        assert str(ek.VARIANTS[name].resolution) in builder.__doc__


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'efficientnet_bo'; did you mean efficientnet_b"):
        ek.create_model("efficientnet_bo")
    with pytest.raises(ValueError, match="there are efficientnet_b0"):
        find_variant("resnet")


@pytest.mark.parametrize("arguments", [{"pretrained": False}, {"pretrained": None}, {"weights": False}], ids=str)
@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_l2"])
def test_networks_may_be_asked_for_as_torchvision_once_did(name, arguments):
    message = f"{next(iter(arguments.values()))} is deprecated, .*weights=None"
    for make in (getattr(ek, name), lambda **options: ek.create_model(name, **options)):
        with pytest.warns(UserWarning, match=message):
            on_meta(make, **arguments)


def test_weights_may_be_given_by_position():
    weights = ek.EfficientNet_B0_Weights.DEFAULT
    with torch.device("meta"):
        assert ek.efficientnet_b0(None).num_classes == 1000
        with pytest.warns(UserWarning, match="pretrained=False"):
            ek.efficientnet_b0(False)
    with pytest.raises(ValueError, match=r"EfficientNet_B1_Weights.*got EfficientNet_B0_Weights"):
        ek.efficientnet_b1(weights)


@pytest.mark.filterwarnings("ignore:pretrained=True")
@pytest.mark.parametrize("name", ["efficientnet_b8", "efficientnet_v2_b0", "tf_efficientnet_l2"])
def test_pretrained_stands_for_weights_that_may_not_exist(name):
    with pytest.raises(ValueError, match=f"weights: expected .* for {name}, got 'IMAGENET1K_V1'"):
        getattr(ek, name)(pretrained=True)


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_v2_b1"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_the_operators_compute_what_the_modules_do(name, size):
    model = getattr(ek, name)(num_classes=10).eval()
    x = torch.randn(2, 3, *size)
    with torch.inference_mode(), ek.use_backend("torch"):
        expected = model(x)
    with torch.inference_mode(), ek.use_backend("reference"):
        assert_close(model(x), expected)
