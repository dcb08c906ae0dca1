"""Other packages' networks as this package's: their weights, and the settings that a state dict does not hold."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from effnet_kernels.interop.adapters import unwrapped
from effnet_kernels.interop.blocks import is_block
from effnet_kernels.interop.verification import SIZES, Observed, agree, first_difference
from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.convert import convert_state_dict, guess_variant, load_checkpoint
from effnet_kernels.modules.conv_bn_act import PaddingMode
from effnet_kernels.modules.inverted_residual import InvertedResidual


@dataclass(frozen=True)
class Settings:
    """The settings that a network computes with and a state dict does not hold.

    Attributes:
        bn_eps, bn_momentum: BatchNorm's, as ``torch.nn.BatchNorm2d`` has them.
        padding: ``"symmetric"``, or ``"same"`` for TensorFlow's.
    """

    bn_eps: float
    bn_momentum: float | None
    padding: PaddingMode


def settings_of(model: nn.Module) -> Settings:
    """The settings of a model of ours, torchvision's, timm's or lukemelas's.

    Raises ValueError for a model without BatchNorm and for one whose BatchNorms differ from each other.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = Counter((norm.eps, norm.momentum) for norm in norms)
    if len(found) != 1:
        raise ValueError(f"expected one eps and momentum in all BatchNorms, got {dict(found) or 'no BatchNorm'}")
    (eps, momentum), _ = found.popitem()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Other packages name their convolution with TensorFlow's padding Conv2d...Same..., or have torch's "same".
    same = any("Same" in type(conv).__name__ or isinstance(conv.padding, str) for conv in convs)
    return Settings(eps, momentum, "same" if same else "symmetric")


def from_peer(peer: nn.Module, verify: bool | Tensor = True) -> EfficientNet:
    """Our network with the weights and settings of another package's, in its mode, on its device and in its dtype.

    Dropout and stochastic depth are the released network's.

    Args:
        peer: an EfficientNet of torchvision, timm or lukemelas. lukemelas fixes its padding at construction from the
            nominal image size; ours is decided by each image, and the two agree on images of the nominal size.
        verify: whether copies of both networks have to agree on a small random batch, or the images [N, C, H, W] to
            compare them on. This finds differences that no tensor shows: strides, activations, gates or pooling.

    Raises ValueError for a model that is no released network, or that computes something else than the released network
    with its weights; it names the first block that differs.
    """
    peer = unwrapped(peer)
    state_dict, settings = peer.state_dict(), settings_of(peer)
    variant = guess_variant(state_dict)
    if variant is None:
        raise ValueError(f"expected one of {', '.join(v for v in VARIANTS if 'tf_' not in v)}, got another network")
    state_dict = convert_state_dict(state_dict)
    variant = replace(
        variant, bn_eps=settings.bn_eps, bn_momentum=cast(float, settings.bn_momentum), padding=settings.padding
    )
    stem, classifier = state_dict["features.0.0.weight"], state_dict.get("classifier.1.weight")
    model = build(variant, in_chans=stem.shape[1], num_classes=0 if classifier is None else classifier.shape[0])
    model.to(stem.device, stem.dtype)
    load_checkpoint(model, state_dict)
    if verify is not False:
        _check_agreement(peer, model, None if verify is True else verify)
    return model.train(peer.training)


def _check_agreement(peer: nn.Module, model: EfficientNet, images: Tensor | None) -> None:
    """Raises ValueError where the two compute something else, with the first block of ``peer`` that does."""
    names = _block_names(peer)
    theirs, ours = Observed(peer, names), Observed(model, _block_names(model))
    if images is None:
        # A network whose padding is fixed for one size agrees on that size alone.
        nominal = getattr(getattr(peer, "_global_params", None), "image_size", None)
        seen = theirs.run_random(model.in_chans, SIZES if nominal is None else (nominal,))
    else:
        seen = theirs.run(images)
    images, expected, their_inputs = seen
    _, y, our_inputs = ours.run(images)
    # Without a classifier lukemelas's features are [N, C, 1, 1].
    if not agree([t.flatten(1) for t in y], [t.flatten(1) for t in expected]):
        found = first_difference(our_inputs, their_inputs, ["the stem", *names])
        raise ValueError(
            f"{found}: the released network with these weights computes something else than the model, on images of "
            f"shape {tuple(images.shape)}; verify=False gives it unseen"
        )


def _block_names(model: nn.Module) -> list[str]:
    """The blocks of a network that we know, in the order of their calls."""
    return [name for name, m in model.named_modules() if isinstance(m, InvertedResidual) or is_block(type(m))]
