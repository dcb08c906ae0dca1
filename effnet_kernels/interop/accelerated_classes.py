"""The classes that accelerate() makes of others: how a block, a sequence of them and a network compute then."""

import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select
from effnet_kernels.fusion.accelerated_class import Accelerated
from effnet_kernels.fusion.cache import kept_of
from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.interop.blocks import ADAPTER_MODULES, Adapter, Pair, adapter_of, look_up
from effnet_kernels.modules import fused_sequence
from effnet_kernels.modules.fused_module import FusedModule


def _outliving(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a method to go on as the original class's ``name`` where another thread restores the module."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(self: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return method(self, *arguments, **named)
            except AttributeError:
                if isinstance(self, Accelerated):
                    raise
                return getattr(self, name)(*arguments, **named)

        return called

    return decorate


class AcceleratedBlock(Accelerated, FusedModule):
    """Mixed into a block's own class: its forward as one fused chain wherever kernels compute it."""

    adapter: ClassVar[Adapter]
    keeps_memory_format = False
    method: ClassVar[str] = "forward"
    # The original's method, as TorchScript compiles it.
    scripted: ClassVar[Callable[..., Any]]
    # What it calls its first argument.
    input_name: ClassVar[str]

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return AcceleratedBlock.dispatched(self, input)
        return self.scripted(input)

    @_outliving("forward")
    def dispatched(self, *arguments: Any, **named: Any) -> Tensor:
        kind = type(self)
        if not arguments and kind.input_name in named:
            arguments = (named.pop(kind.input_name),)
        if not arguments:
            # The original's own error.
            return kind.original.forward(self, **named)
        fused = FusedModule.fused(self, *arguments, **named)
        if fused is not None:
            return fused
        input, *others = arguments
        return kind.original.forward(self, FusedModule.given_to_hooks(self, input), *others, **named)

    def chain_spec(self) -> ChainSpec:
        return type(self).adapter(self)


def _forward_of_x(self: Any, x: Tensor) -> Tensor:
    """:meth:`AcceleratedBlock.forward`, for a caller who names the argument so."""
    if not torch.jit.is_scripting():
        return AcceleratedBlock.dispatched(self, x)
    return self.scripted(x)


class AcceleratedSequence(Accelerated):
    """Mixed into ``nn.Sequential`` where it holds blocks alone: at inference they are computed together."""

    method: ClassVar[str] = "forward"
    scripted: ClassVar[Callable[..., Any]]

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return AcceleratedSequence.dispatched(self, input)
        return self.scripted(input)

    @_outliving("forward")
    def dispatched(self: Any, input: Tensor) -> Tensor:
        y = fused_sequence.infer(self, input)
        if y is None:
            y = type(self).original.forward(self, input)
        # As a block's that a hook looks at.
        return y.contiguous() if self._forward_hooks else y


def name_in_the_way(module: nn.Module) -> str | None:
    """An attribute of a module or its class that a class to be mixed in would hide, or be hidden by; or None."""
    kind = type(module)
    if issubclass(kind, Accelerated):
        return None
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    own = {*vars(module), *module._modules, *module._parameters, *module._buffers}.union(*map(vars, classes))
    mixed = [base for base in _mixed_into(kind).__mro__ if base not in nn.Module.__mro__]
    added = {name for base in mixed for name in (*vars(base), *inspect.get_annotations(base))}
    return next((name for name in sorted(added & own - _WRAPPED) if not name.startswith("__")), None)


def is_sequence_of_blocks(module: nn.Module) -> bool:
    """Whether a module is torch's plain sequence, maybe of such sequences, of two blocks or more that were switched."""
    if type(module) is not nn.Sequential:
        return False
    blocks = fused_sequence.fused_modules(module)
    return len(blocks) > 1 and all(isinstance(block, AcceleratedBlock) for block in blocks)


Pairs = tuple[tuple[str, str, str | None], ...]


class AcceleratedNetwork(Accelerated):
    """Mixed into the class of a network that calls its stem, and maybe its head, convolution by convolution."""

    # The method that calls them.
    method: ClassVar[str]
    # The names of a convolution, its norm and the activation behind it.
    pairs: ClassVar[Pairs]
    # The original's method, as TorchScript compiles it.
    scripted: ClassVar[Callable[..., Any]]


def pair_of(network: Any, index: int) -> nn.Module:
    """The stem (0) or the head (1) of an accelerated network as a block on the kernels."""
    parts = [None if name is None else network._modules[name] for name in network.pairs[index]]
    return _made_of(network, ("pair", index), parts, accelerated_class(Pair))


def _sequence(network: Any, first: int, blocks: list[nn.Module]) -> nn.Module:
    """Some blocks of an accelerated network, of which the first has this number, as a sequence."""
    return _made_of(network, ("sequence", first), blocks, nn.Sequential)


def _made_of(network: Any, key: tuple[str, int], parts: list[Any], kind: Callable[..., nn.Module]) -> nn.Module:
    """A module of these parts, in eval mode itself; the one that was made before where it has them."""
    # No children of the network: such modules are not copied, written or listed with it.
    kept = kept_of(network).setdefault(AcceleratedNetwork, {})
    before, made = kept.get(key, (None, None))
    if before != parts:
        made = kind(*parts)
        made.training = False
        kept[key] = parts, made
    return cast(nn.Module, made)


class _Together:
    """Blocks as the loop of a network calls them, one by one: the first call computes them all, where it can."""

    def __init__(self, sequence: nn.Module, blocks: list[nn.Module]) -> None:
        self._sequence, self._computed = sequence, False
        self.calls = [partial(self._first, blocks[0]), *(partial(self._other, block) for block in blocks[1:])]

    def _first(self, block: nn.Module, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        y = fused_sequence.infer(self._sequence, x)
        self._computed = y is not None
        return cast(Tensor, block(x, *arguments, **named)) if y is None else y

    def _other(self, block: nn.Module, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return x if self._computed else cast(Tensor, block(x, *arguments, **named))


class _View:
    """An accelerated network as its own method gets it.

    Convolution, norm and activation of a pair are one block. Blocks that the method calls in a loop are computed
    together, up to each of the numbers ``ends``; without them as they are.
    """

    def __init__(self, network: Any, ends: Sequence[int]) -> None:
        self._network = network
        for index, (first, *behind) in enumerate(network.pairs):
            setattr(self, first, pair_of(network, index))
            for name in behind:
                if name is not None:
                    setattr(self, name, _unchanged)
        if any(ends):
            blocks = list(network._blocks)
            self._blocks: list[Any] = []
            for start, end in itertools.pairwise([0, *ends]):
                part = blocks[start:end]
                self._blocks += _Together(_sequence(network, start, part), part).calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _in_parts(name: str, ends: Callable[[Any], Sequence[int]] = lambda network: ()) -> Callable[..., Any]:
    """The original's method of this name on a :class:`_View`, where no tracer or hook observes the call."""

    @_outliving(name)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        x = next(iter((*arguments, *named.values())), None)
        # A tracer cannot follow the parts' making, and a global hook would see parts that the network does not have.
        observed = (
            torch.compiler.is_compiling() or select.interception(x) is not None or select.global_hook() is not None
        )
        network = self if observed else _View(self, ends(self))
        return getattr(type(self).original, name)(network, *arguments, **named)

    return method


class TimmNetwork(AcceleratedNetwork):
    method = "forward_features"
    pairs: ClassVar[Pairs] = (("conv_stem", "bn1", None), ("conv_head", "bn2", None))
    dispatched = _in_parts("forward_features")
    forward_intermediates = _in_parts("forward_intermediates")

    def forward_features(self: Any, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return TimmNetwork.dispatched(self, x)
        return self.scripted(x)


class TimmMobileNet(TimmNetwork):
    pairs = TimmNetwork.pairs[:1]


class TimmFeatures(AcceleratedNetwork):
    method = "forward"
    pairs = TimmNetwork.pairs[:1]
    dispatched = _in_parts("forward")

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        if not torch.jit.is_scripting():
            return TimmFeatures.dispatched(self, x)
        return self.scripted(x)


class TimmMobileFeatures(TimmFeatures):
    pairs = (("conv_stem", "bn1", "act1"),)


class LukemelasNetwork(AcceleratedNetwork):
    method = "extract_features"
    pairs: ClassVar[Pairs] = (("_conv_stem", "_bn0", "_swish"), ("_conv_head", "_bn1", "_swish"))
    extract_features = _in_parts("extract_features", lambda network: [len(network._blocks)])
    extract_endpoints = _in_parts("extract_endpoints")


def _behind_maps(encoder: Any) -> list[int]:
    """The numbers behind the blocks whose outputs an encoder returns, and behind the last."""
    every = range(len(encoder._blocks))
    return sorted({index + 1 for index in encoder._out_indexes if index in every} | {len(every)})


class SmpEncoder(AcceleratedNetwork):
    method = "forward"
    pairs = LukemelasNetwork.pairs[:1]
    dispatched = _in_parts("forward", _behind_maps)

    def forward(self, x: Tensor) -> list[Tensor]:
        if not torch.jit.is_scripting():
            return SmpEncoder.dispatched(self, x)
        return self.scripted(x)


# The classes that are mixed into known networks' classes. A class that has one of the methods of its own is unknown.
_NETWORKS: dict[str, type[AcceleratedNetwork]] = {
    "timm.models.efficientnet.EfficientNet": TimmNetwork,
    "timm.models.efficientnet.EfficientNetFeatures": TimmFeatures,
    "timm.models.mobilenetv3.MobileNetV3": TimmMobileNet,
    "timm.models.mobilenetv3.MobileNetV3Features": TimmMobileFeatures,
    "efficientnet_pytorch.model.EfficientNet": LukemelasNetwork,
    "segmentation_models_pytorch.encoders.efficientnet.EfficientNetEncoder": SmpEncoder,
    "segmentation_models_pytorch.encoders.timm_efficientnet.EfficientNetBaseEncoder": TimmFeatures,
}
_METHODS = ("forward", "forward_features", "extract_features")
_METHODS_OF_ANY_ARGUMENTS = ("forward_intermediates", "extract_features", "extract_endpoints")
# Those that call the original's.
_WRAPPED = {*_METHODS, *_METHODS_OF_ANY_ARGUMENTS}


def network_of(kind: type) -> type[AcceleratedNetwork] | None:
    """The class to mix into a network's class; None for other modules, and for a class that has it already."""
    return None if issubclass(kind, AcceleratedNetwork) else look_up(kind, _NETWORKS, _METHODS)


def _mixed_into(kind: type[nn.Module]) -> Any:
    """The class to mix into a network's, a sequence's or a block's class."""
    return network_of(kind) or (AcceleratedSequence if kind is nn.Sequential else AcceleratedBlock)


_KNOWN_MODULES = ADAPTER_MODULES | {name.rpartition(".")[0] for name in _NETWORKS} | {nn.Sequential.__module__}
_classes: dict[type[nn.Module], Any] = {}


def accelerated_class(original: type[nn.Module]) -> Any:
    """The subclass for modules of a class. It can be imported from this module, under a name without dots."""
    if original not in _classes:
        adapter, mixed_in = adapter_of(original), _mixed_into(original)
        own = getattr(original, mixed_in.method)
        _, input_name, *others = inspect.signature(own).parameters
        forwards: dict[str, Any] = {}
        if adapter is not None and others:
            # TorchScript knows no variable arguments, and so no block that takes more than its input.
            forwards["forward"] = _with_signature_of(own, AcceleratedBlock.dispatched)
        elif adapter is not None and input_name == "x":
            forwards["forward"] = _under_the_name("forward", _forward_of_x)
        for name in _METHODS_OF_ANY_ARGUMENTS:
            if hasattr(mixed_in, name) and hasattr(original, name):
                forwards[name] = _with_signature_of(getattr(original, name), getattr(mixed_in, name))
        made = type(
            original.__name__,
            (mixed_in, original),
            {
                "original": original,
                "scripted": _under_the_name("scripted", own),
                "input_name": input_name,
                **({} if adapter is None else {"adapter": staticmethod(adapter)}),
                **forwards,
                "__module__": __name__,
                "__qualname__": f"{original.__module__}:{original.__qualname__}".replace(".", "/"),
                "__doc__": original.__doc__,
            },
        )
        _classes[original] = made
    return _classes[original]


def _can_be_switched(kind: type[nn.Module]) -> bool:
    return adapter_of(kind) is not None or network_of(kind) is not None or kind is nn.Sequential


def _with_signature_of(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes any arguments, documented and inspected as the original."""

    @functools.wraps(original)
    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        return method(self, *arguments, **named)

    return called


def _under_the_name(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under another name, by which TorchScript knows it, in the scope that its names are looked up in."""
    if not isinstance(function, FunctionType):
        return function
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__annotations__, copied.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
    return copied


def __getattr__(name: str) -> Any:
    """A subclass by its name, for pickle.

    Only the modules of the tables of known classes are imported for it, and nothing but a class of those tables, or one
    derived from it in a module that is imported already, is found: a pickle cannot lead from here to anything else.
    """
    path, colon, qualified = name.replace("/", ".").partition(":")
    found: Any = None
    if colon:
        found = importlib.import_module(path) if path in _KNOWN_MODULES else sys.modules.get(path)
        for part in qualified.split("."):
            # Not getattr, which could run a module's own __getattr__ or a descriptor.
            found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
    if not isinstance(found, type) or not _can_be_switched(found):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: expected the name of an accelerated class"
        )
    return accelerated_class(found)
