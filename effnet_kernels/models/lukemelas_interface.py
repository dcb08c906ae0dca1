"""The methods of a network, and the names of its parts, for code written for the package `efficientnet_pytorch`."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor, nn

from effnet_kernels.models import lukemelas
from effnet_kernels.models.weights.convert import load_checkpoint
from effnet_kernels.models.weights.pretrained import resolve_weights
from effnet_kernels.modules import ConvBnAct

Network = TypeVar("Network", bound="LukemelasInterface")


class Blocks(nn.ModuleList):
    """The blocks of all stages in one list; a block that is assigned to an index becomes the network's.

    Raises TypeError where the number of blocks would change.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.places = [(stage, name) for stage in stages for name in stage._modules]
        for index, (stage, name) in enumerate(self.places):
            self._modules[str(index)] = stage.get_submodule(name)

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def __setitem__(self, index: int, block: nn.Module) -> None:
        super().__setitem__(index, block)
        stage, name = self.places[index]
        setattr(stage, name, block)

    def _refuse(self, *arguments: Any) -> NoReturn:
        raise TypeError("_blocks: expected as many blocks as there are; to have others, change the stages in features")

    append = extend = insert = pop = __delitem__ = __iadd__ = _refuse  # type: ignore[assignment]


def _alias(child: str, *owners: Callable[[Any], nn.Module]) -> property:
    """A property for the child of a module of the network; assigning to it replaces the child in all ``owners``."""

    def get(network: nn.Module) -> Any:
        return getattr(owners[0](network), child)

    def put(network: nn.Module, module: nn.Module) -> None:
        for owner in [find(network) for find in owners]:
            setattr(owner, child, module)

    return property(get, put)


def _stem(network: Any) -> nn.Module:
    return _convolution(network, 0)


def _head(network: Any) -> nn.Module:
    return _convolution(network, -1)


def _convolution(network: Any, index: int) -> nn.Module:
    layers = list(network.features._modules.values())
    if len(layers) < 2 or not isinstance(layers[index], ConvBnAct):
        got = ", ".join(type(layer).__name__ for layer in layers) or "none"
        raise AttributeError(f"expected a ConvBnAct as features[{index}] of several layers, got {got}")
    return layers[index]


def _classifier(network: Any) -> nn.Module:
    classifier = network.classifier
    if type(classifier) is not nn.Sequential or len(classifier) != 2:
        got = ", ".join(type(layer).__name__ for layer in classifier.children()) or type(classifier).__name__
        raise AttributeError(f"expected a sequence of two as classifier, dropout and a linear layer, got {got}")
    return classifier


class LukemelasInterface(nn.Module):
    """The interface of `efficientnet_pytorch`, for networks that :meth:`from_name` and :meth:`from_pretrained` make.

    ``_conv_stem``, ``_bn0``, ``_blocks``, ``_conv_head``, ``_bn1``, ``_swish``, ``_avg_pooling``, ``_dropout`` and
    ``_fc`` are other names of the network's modules, to read and to assign to: ``model._fc = nn.Linear(1280, 2)``
    replaces ``model.classifier[1]``. ``_global_params`` has the settings that it was made with. As in that package,
    ``forward`` calls ``extract_features``, which a subclass may override.

    Left out are:

    - That package's keys and names: those of parameters and modules are torchvision's, ``classifier.1.weight`` and not
      ``_fc.weight``. ``load_checkpoint`` and ``convert_state_dict`` translate.
    - The inside of that package's blocks: the blocks are :class:`MBConv`, without ``_expand_conv`` or ``_block_args``,
      and called without ``drop_connect_rate``, which is each block's ``stochastic_depth.p``.
    - Another number of ``_blocks``, ``_blocks_args``, ``_change_in_channels``, and the constructor's ``blocks_args``.
    """

    _conv_stem = _alias("0", _stem)
    _bn0 = _alias("1", _stem)
    _conv_head = _alias("0", _head)
    _bn1 = _alias("1", _head)
    _swish = _alias("2", _stem, _head)
    _avg_pooling = _alias("avgpool", lambda network: network)
    _dropout = _alias("0", _classifier)
    _fc = _alias("1", _classifier)
    # The settings that the network was made with; TorchScript has no use for them.
    _global_params: Any
    __jit_ignored_attributes__ = ("_global_params",)

    @property
    def _blocks(self) -> Blocks:
        layers = self.get_submodule("features")._modules.values()
        return Blocks(layer for layer in layers if type(layer) is nn.Sequential)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a module under the name without asking for a property.
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def extract_features(self: Any, inputs: Tensor) -> Tensor:
        """The map [N, num_features, H / 32, W / 32] that is pooled."""
        return self.features(inputs)

    def extract_endpoints(self: Any, inputs: Tensor) -> dict[str, Tensor]:
        """The last map of each resolution under ``reduction_1`` (half the image's) to ``reduction_5``, and the head's.

        The head's output is the last entry, ``reduction_6`` where the image has more than 16 rows.
        """
        *maps, head = self.maps(inputs, list(range(len(self.features))))
        last = [x for x, following in pairwise(maps) if x.shape[2] > following.shape[2]]
        return {f"reduction_{index}": x for index, x in enumerate([*last, maps[-1], head], 1)}

    def set_swish(self, memory_efficient: bool = True) -> None:
        """Does nothing: the one SiLU that there is saves memory and can be exported."""

    @classmethod
    def get_image_size(cls, model_name: str) -> int:
        """The resolution that the network of that name was released for; raises ValueError for an unknown one."""
        return lukemelas.variant_of(model_name).resolution

    @classmethod
    def from_name(cls: type[Network], model_name: str, in_channels: int = 3, **override_params: Any) -> Network:
        """The network of that name with that package's SAME padding, BatchNorm eps 1e-3 and momentum 0.01.

        Its padding is decided by the size of each input; that package fixes it from ``image_size`` at construction, and
        the two agree on images of that size.

        Args:
            model_name: ``efficientnet-b0`` ... ``efficientnet-b8``, ``efficientnet-l2``, ``efficientnet-lite0`` ...
            in_channels: channels of the image.
            **override_params: ``num_classes``, ``dropout_rate``, ``drop_connect_rate``, ``width_coefficient``,
                ``depth_coefficient``, ``batch_norm_epsilon``, ``batch_norm_momentum`` (the share of the old statistics,
                as TensorFlow counts), ``include_top`` (False: pooled features [N, C], in that package [N, C, 1, 1]) and
                ``image_size`` (without effect).

        Raises ValueError for a name or an override that is none of these.
        """
        released = lukemelas.variant_of(model_name)
        variant, options = lukemelas.overridden(released, override_params)
        model: Any = cast(Any, cls).of_variant(variant, in_chans=in_channels, **options)
        model._global_params = lukemelas.GlobalParams(
            width_coefficient=variant.width,
            depth_coefficient=variant.depth,
            image_size=override_params.get("image_size", released.resolution),
            dropout_rate=variant.dropout,
            num_classes=override_params.get("num_classes", 1000),
            batch_norm_momentum=1 - variant.bn_momentum,
            batch_norm_epsilon=variant.bn_eps,
            drop_connect_rate=override_params.get("drop_connect_rate", 0.2),
            include_top=override_params.get("include_top", True),
        )
        return model

    @classmethod
    def from_pretrained(
        cls: type[Network],
        model_name: str,
        weights_path: str | None = None,
        advprop: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        **override_params: Any,
    ) -> Network:
        """:meth:`from_name` with trained weights, from ``weights_path`` or from that package's release.

        A classifier of other than 1000 classes, and a stem of other than 3 channels, keep their initial weights.

        Raises ValueError for a name without released weights, and for weights that do not fit.
        """
        weights = lukemelas.checkpoint_of(model_name, advprop) if weights_path is None else weights_path
        model = cls.from_name(model_name, in_channels, num_classes=num_classes, **override_params)
        state_dict = resolve_weights(lukemelas.variant_of(model_name).name, weights).get_state_dict()
        load_checkpoint(model, state_dict, skip_classifier=num_classes != 1000, skip_stem=in_channels != 3)
        return model


ALIASES = tuple(name for name, member in vars(LukemelasInterface).items() if isinstance(member, property))
