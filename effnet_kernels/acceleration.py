"""accelerate(): other packages' networks on this package's operators, in place."""

import importlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from effnet_kernels import dispatch
from effnet_kernels.modules.chain import ChainModule, Parts, plan_chain, run_chain, run_operators
from effnet_kernels.modules.operator_module import OperatorModule
from effnet_kernels.peer_blocks import Reader, UnknownPart, reader_of

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Switches every block that the operators know to them, in place, and returns the model.

    Blocks are known by their class: those of torchvision's EfficientNets and MobileNets, of timm's ``efficientnet``,
    ``tf_efficientnet``, ``efficientnetv2``, ``mobilenetv2``, ``mobilenetv3`` and ``mnasnet``, of
    ``efficientnet_pytorch`` and its copy in ``segmentation_models_pytorch``, and of classes that inherit their
    ``forward``. A block becomes an instance of a subclass of its own class; parameters, buffers, names, hooks and the
    class's other methods stay. A block with a part that the operators do not know is left alone, and one that changes
    later (a hook inside, a parametrization, another norm) computes as it did for as long as that is so.
    ``print(explain(model))`` lists what was switched, and why the rest was not. :func:`restore` undoes it.

    Outputs of switched blocks are in channels-last strides. Models may be trained, copied, pickled and accelerated
    again; for ``torch.jit.script`` restore them first.

    Args:
        model: any module, in any mode, on any device.

    Raises TypeError for what is no module. Warns where nothing was found to switch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found = list(_blocks(model))
    for block in found:
        if why_left_alone(block) is None:
            object.__setattr__(block, "__class__", _accelerated_class(type(block)))
    if not any(isinstance(module, OperatorModule) for module in model.modules()):
        warnings.warn(f"accelerate() found nothing in {type(model).__name__} that it could switch", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Gives every block that :func:`accelerate` switched its own class back, and returns the model."""
    for module in model.modules():
        if isinstance(module, Accelerated):
            object.__setattr__(module, "__class__", module.original)
    return model


def why_left_alone(block: nn.Module) -> str | None:
    """Why a block of a known class cannot run on the operators as it is now, or None; None for other modules too."""
    reader = reader_of(type(block))
    return None if reader is None else _unreadable(block, reader)


def _unreadable(block: nn.Module, reader: Reader) -> str | None:
    try:
        excitation = reader(block).excitation
    except (UnknownPart, AttributeError) as reason:
        return str(reason)
    if excitation is not None and excitation.gate != "sigmoid":
        return f"the operators have no {excitation.gate} gate"
    return None


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of known classes."""
    if isinstance(module, OperatorModule):
        return
    if reader_of(type(module)) is not None:
        yield module
        return
    for child in module.children():
        yield from _blocks(child)


class Accelerated(ChainModule):
    """Mixed into a block's own class: its forward on the operators wherever they can stand for it."""

    original: ClassVar[type[nn.Module]]
    reader: ClassVar[Reader]

    def forward(self, input: Tensor, *arguments: Any, **named: Any) -> Tensor:
        backend = dispatch.choose(self, input).backend
        if backend == "torch":
            return self.original.forward(self, input, *arguments, **named)
        x = input.contiguous(memory_format=torch.channels_last)
        parts = self.plan("parts", self.parts)
        keep = parts.draw(x, *arguments, **named)
        if backend == "reference":
            return run_operators(parts, x, keep)
        size = (x.shape[2], x.shape[3])
        return run_chain(self.plan((size, False), lambda: plan_chain(parts, size)), x, keep)

    def parts(self) -> Parts:
        return type(self).reader(self)

    def find_obstacle(self) -> str | None:
        return _unreadable(self, type(self).reader)


_classes: dict[type[nn.Module], type[Accelerated]] = {}


def _accelerated_class(original: type[nn.Module]) -> type[Accelerated]:
    """The subclass for blocks of a class. It can be imported from this module, under a name without dots."""
    if original not in _classes:
        reader = reader_of(original)
        assert reader is not None
        made = type(
            original.__name__,
            (Accelerated, original),
            {
                "original": original,
                "reader": staticmethod(reader),
                "__module__": __name__,
                "__qualname__": f"{original.__module__}:{original.__qualname__}".replace(".", "/"),
                "__doc__": original.__doc__,
            },
        )
        _classes[original] = made
    return _classes[original]


def __getattr__(name: str) -> type[Accelerated]:
    """A subclass by its name, for pickle."""
    module, colon, qualified = name.replace("/", ".").partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return _accelerated_class(found)
