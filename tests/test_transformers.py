"""Checkpoints of Hugging Face's transformers: its keys, and its numbers where it is installed."""

import pytest
import torch
from conftest import TOLERANCES, randomize, relative_rms

from effnet_kernels import from_peer
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.convert import convert_state_dict, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def transformers_keys(expanded: list[bool], prefix: str = "efficientnet.") -> list[str]:
    """The keys of ``EfficientNetForImageClassification`` (modeling_efficientnet.py), block by block."""

    def norm(name: str) -> list[str]:
        leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{leaf}" for leaf in leaves]

    keys = ["embeddings.convolution.weight", *norm("embeddings.batchnorm")]
    for index, expands in enumerate(expanded):
        block = f"encoder.blocks.{index}."
        if expands:
            keys += [f"{block}expansion.expand_conv.weight", *norm(f"{block}expansion.expand_bn")]
        keys += [f"{block}depthwise_conv.depthwise_conv.weight", *norm(f"{block}depthwise_conv.depthwise_norm")]
        keys += [f"{block}squeeze_excite.{conv}.{leaf}" for conv in ("reduce", "expand") for leaf in ("weight", "bias")]
        keys += [f"{block}projection.project_conv.weight", *norm(f"{block}projection.project_bn")]
    keys += ["encoder.top_conv.weight", *norm("encoder.top_bn")]
    return [prefix + key for key in keys]


BLOCKS = {"b0": 16, "b1": 23, "b2": 23, "b3": 26, "b4": 32, "b5": 39, "b6": 45, "b7": 55}


@pytest.mark.parametrize("name", BLOCKS)
def test_keys_of_transformers(name: str) -> None:
    with torch.device("meta"):
        own = build(VARIANTS[f"efficientnet_{name}"]).state_dict()
    unexpanded = len([key for key in own if key.startswith("features.1.") and key.endswith("block.0.0.weight")])
    expanded = [index >= unexpanded for index in range(BLOCKS[name])]
    expected = [*transformers_keys(expanded), "classifier.weight", "classifier.bias"]
    converted = convert_state_dict(own, "transformers")
    assert list(converted) == expected
    assert all(converted[key] is value for key, value in zip(expected, own.values(), strict=True))
    # Released checkpoints: as they are, of the network without a classifier, and inside of other models.
    bare = dict(zip(transformers_keys(expanded, ""), own.values(), strict=False))
    for given, prefix in ((converted, ""), (converted, "model."), (bare, ""), (bare, "backbone.")):
        back = convert_state_dict({prefix + key: value for key, value in given.items()})
        assert all(back[key] is own[key] for key in back)
        assert len(back) == len(given)


@pytest.mark.parametrize("name", ["b0", "b3"])
def test_numbers_of_transformers(name: str) -> None:
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    variant = VARIANTS[f"tf_efficientnet_{name}"]
    config = package.EfficientNetConfig(
        width_coefficient=variant.width,
        depth_coefficient=variant.depth,
        image_size=224,
        hidden_dim=variant.last_channel or 4 * variant.block_configs()[-1].out_channels,
        # The blocks whose padding is not that of an even map: none at 224.
        depthwise_padding=[],
        num_labels=10,
    )
    theirs = randomize(package.EfficientNetForImageClassification(config)).double().eval()
    ours = build(variant, num_classes=10).double().eval()
    load_checkpoint(ours, theirs.state_dict())
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        got, expected = ours(x), theirs(x).logits
    assert expected.std() > 1e-3
    assert relative_rms(got, expected) <= TOLERANCES[torch.float32]
    # Its BatchNorms have two momenta, which one network of ours does not.
    with pytest.raises(ValueError, match="one eps and momentum"):
        from_peer(theirs)
