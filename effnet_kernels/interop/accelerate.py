"""accelerate(): other packages' networks on this package's kernels, in place."""

import warnings
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from effnet_kernels.fusion.accelerated_class import Accelerated
from effnet_kernels.fusion.cache import forget
from effnet_kernels.fusion.inspection import Unsupported
from effnet_kernels.interop.accelerated_classes import (
    accelerated_class,
    is_sequence_of_blocks,
    name_in_the_way,
    network_of,
)
from effnet_kernels.interop.blocks import adapter_of
from effnet_kernels.modules.fused_module import FusedModule

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Switches every block that the kernels can compute to them, in place, and returns the model.

    Blocks are known by their class: those of torchvision's EfficientNets and MobileNets, of timm's ``efficientnet``,
    ``tf_efficientnet``, ``efficientnetv2``, ``mobilenetv2``, ``mobilenetv3`` and ``mnasnet``, of
    ``efficientnet_pytorch`` and its copy in ``segmentation_models_pytorch``, and of classes that inherit their
    ``forward``. A block becomes an instance of a subclass of its own class; parameters, buffers, names, hooks and the
    class's other methods stay. A block with a part that no kernel computes is left alone, and one that changes
    later (a hook inside, a parametrization, another norm) computes as it did for as long as that is so.
    ``print(explain(model))`` lists what was switched, and why the rest was not. :func:`restore` undoes it.

    A plain ``torch.nn.Sequential`` of switched blocks is switched likewise: in eval mode without gradients it computes
    them together, unless a hook or anything else observes a call that this would leave out. So do the networks of
    ``efficientnet_pytorch`` and the encoders of ``segmentation_models_pytorch``, which have a list of blocks instead.

    Outputs of switched blocks are in channels-last strides. Models may be trained, copied, pickled and accelerated
    again; ``torch.jit.script`` compiles the blocks' own forward, as if they were not switched. Before reading a pickle
    with a block of a class of your own, import that class's module.

    Args:
        model: any module, in any mode, on any device.

    Raises TypeError for anything but a module. Warns where nothing was found to switch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    # A block may be in several places.
    found = list(dict.fromkeys(_blocks(model)))
    for block in found:
        if why_left_alone(block) is None:
            object.__setattr__(block, "__class__", accelerated_class(type(block)))
    for module in model.modules():
        known = network_of(type(module)) is not None or is_sequence_of_blocks(module)
        if known and name_in_the_way(module) is None:
            object.__setattr__(module, "__class__", accelerated_class(type(module)))
    if not any(isinstance(module, FusedModule) for module in model.modules()):
        warnings.warn(_found_nothing(model, found), stacklevel=2)
    return model


def _found_nothing(model: nn.Module, known: list[nn.Module]) -> str:
    text = f"accelerate() found nothing in {type(model).__name__} that it could switch"
    if not known:
        return text
    first = next(name for name, module in model.named_modules() if module is known[0])
    return (
        f"{text}: it left alone all {len(known)} blocks that it knows, {first or 'the model'} because "
        f"{why_left_alone(known[0])}; print(effnet_kernels.explain(model)) lists them"
    )


def restore(model: Model) -> Model:
    """Gives every block that :func:`accelerate` switched its own class back, and returns the model."""
    for module in model.modules():
        if isinstance(module, Accelerated):
            object.__setattr__(module, "__class__", module.original)
        forget(module)
    return model


def why_left_alone(block: nn.Module) -> str | None:
    """Why a block of a known class cannot run on the kernels as it is now, or None; None for other modules too."""
    adapter = adapter_of(type(block))
    if adapter is None:
        return None
    name = name_in_the_way(block)
    if name is not None:
        return f"it has an attribute {name!r} of its own, a name that accelerate() uses"
    try:
        adapter(block)
    except Unsupported as reason:
        return str(reason)
    return None


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of known classes."""
    if isinstance(module, FusedModule):
        return
    if adapter_of(type(module)) is not None:
        yield module
        return
    for child in module.children():
        yield from _blocks(child)
