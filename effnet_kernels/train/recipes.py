"""Recipes: complete settings of training, each with its source."""

from typing import Any

from effnet_kernels.models.weights.pretrained import resolve_weights, usual_preprocess
from effnet_kernels.train.config import Config

Values = dict[str, dict[str, Any]]

_RMSPROP = {"name": "rmsproptf", "momentum": 0.9, "options": {"alpha": 0.9, "eps": 1e-3}, "weight_decay": 1e-5}
_STEPS = {"shape": "steps", "warmup_epochs": 5, "decay_rate": 0.97, "decay_epochs": 2.4}

# Only what differs from config.py's values.
RECIPES: dict[str, Values] = {
    # Tan and Le 2019, section 5.2, with what its text leaves open from the authors' code (tensorflow/tpu,
    # models/official/efficientnet: utils.py and main.py).
    "paper": {
        "augmentation": {"policy": "imagenet"},
        "optimizer": {**_RMSPROP, "lr": 0.016, "lr_batch": 256},
        "schedule": {**_STEPS, "epochs": 350},
        "training": {"ema": 0.9999},
    },
    # Wightman, Touvron and Jegou 2021, "ResNet strikes back": augmentation and schedule of procedure A2, with AdamW and
    # the cross entropy in place of LAMB and the binary cross entropy.
    "modern": {
        "augmentation": {"policy": "randaugment", "magnitude": 7, "mixup": 0.1, "cutmix": 1.0},
        "optimizer": {"name": "adamw", "lr": 1e-3, "lr_batch": 512, "weight_decay": 0.02},
        "schedule": {"epochs": 300, "warmup_epochs": 5},
        "training": {"ema": 0.9999, "clip": 1.0},
    },
    # Kornblith, Shlens and Le 2019, "Do better ImageNet models transfer better?", for tuning all layers with a cosine.
    # The classifier comes first, at ten times the rate, and AdamW is in place of their SGD, whose rate needs a search:
    # 28 photographs of three things and 6 epochs give 100 % instead of 88 %.
    "finetune": {
        "network": {"weights": "DEFAULT", "freeze_epochs": 1},
        "augmentation": {"min_scale": 0.35},
        "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01, "backbone_lr_ratio": 0.1},
        "schedule": {"epochs": 20, "warmup_epochs": 1},
        "training": {"clip": 1.0},
    },
    # DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with Cutout", for shifted
    # and mirrored images. AdamW in place of their SGD: 15 epochs of digits give 99.4 % instead of 96.1 %.
    "cifar": {
        "network": {"low_resolution": True},
        "data": {"image_size": 32},
        "augmentation": {"crop": "shift"},
        "optimizer": {"name": "adamw", "lr": 4e-3, "lr_batch": 128, "weight_decay": 0.02},
        "schedule": {"epochs": 100, "warmup_epochs": 2},
        "training": {"ema": 0.999, "clip": 1.0},
    },
    # Tan and Le 2021, section 5.1, and table 6 for EfficientNetV2-S.
    "v2": {
        "network": {"name": "efficientnet_v2_s", "dropout": 0.3},
        "data": {"image_size": 300, "resize": 384},
        "augmentation": {"policy": "randaugment", "magnitude": 15},
        "optimizer": {**_RMSPROP, "lr": 0.256, "lr_batch": 4096},
        "schedule": {**_STEPS, "epochs": 350},
        "progressive": {"stages": 4, "image_size": 128, "magnitude": 5, "mixup": 0.0, "dropout": 0.1},
        "training": {"ema": 0.9999},
    },
}

_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}

# What a data set needs whatever the recipe.
DATA_SETS: dict[str, Values] = {
    # Images of 8x8 pixels; a mirrored digit is another sign, or none.
    "digits": {"data": {"image_size": 16}, "augmentation": {"flip": False}, "schedule": {"epochs": 10}},
    "cifar10": {"data": _CIFAR},
    "cifar100": {"data": _CIFAR},
}


def resolve(values: Values, recipe: str | None = None) -> Config:
    """The complete configuration: the recipe's values, the data set's, and over them the user's ``values``.

    Without a recipe, ``cifar`` for the data sets that are named here and ``modern`` for others. The size of images and
    how they are prepared come from the trained weights, or the network, where nothing says otherwise.

    Raises ValueError for an unknown recipe, network or value.
    """
    data = values.get("data", {}).get("name", "digits")
    recipe = recipe or ("cifar" if data in DATA_SETS else "modern")
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    config = Config(recipe=recipe)
    for layer in (RECIPES[recipe], DATA_SETS.get(data, {}), values):
        config = config.override(layer)
    network = config.network
    if network.weights is None:
        preprocess = usual_preprocess(network.name)
    else:
        weights = resolve_weights(network.name, network.weights)
        preprocess = weights.transforms()
        # TensorFlow's weights need the network's tf_ variant, and timm's others the eps that they were trained with.
        eps = network.bn_eps if network.bn_eps is not None else weights.bn_eps
        config = config.override({"network": {"name": weights.variant or network.name, "bn_eps": eps}})
    size = config.data.image_size
    prepared = {
        "image_size": int(preprocess.crop_size),
        "resize": int(preprocess.resize_size) if size is None else size,
        "interpolation": preprocess.interpolation,
        "squash": preprocess.squash,
        "mean": preprocess.mean,
        "std": preprocess.std,
    }
    return config.override({"data": {**prepared, **config.data.model_dump(exclude_none=True)}})
