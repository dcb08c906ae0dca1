"""Whole networks, this package's and others', read as chains: stem, stages, head, and the modules behind them.

All of a network is known, or it is refused: every module that its forward calls between the image and the last map is
read, and those that it applies to that map stay its own.
"""

from torch import nn

from effnet_kernels.backends import select
from effnet_kernels.fusion.accelerated_class import original_of
from effnet_kernels.fusion.inspection import Unsupported, deviation
from effnet_kernels.fusion.spec import Chain
from effnet_kernels.interop import accelerated_classes, efficientnet_pytorch, timm, torchvision
from effnet_kernels.interop.adapters import NetworkAdapter, NetworkParts, name_of
from effnet_kernels.interop.blocks import adapter_of
from effnet_kernels.modules.fused_module import FusedModule

_NETWORKS: dict[str, NetworkAdapter] = {**torchvision.NETWORKS, **timm.NETWORKS, **efficientnet_pytorch.NETWORKS}


def read_network(model: nn.Module) -> NetworkParts:
    """The parts of an EfficientNet of ours, torchvision, timm or ``efficientnet_pytorch``, or of a relative of it.

    Raises:
        TypeError: for another model; the message names a network inside of it, if there is one.
        ValueError: for a part that is not known, by its name: another class, hooks, methods that were replaced.
    """
    kind = _kind_of(model)
    if kind is None:
        inside = next((name for name, inner in model.named_modules() if name and _is_known(inner)), None)
        hint = ""
        if inside is not None:
            hint = (
                f"; freeze its part model.get_submodule({inside!r}), which is one, with features_only=True for its maps"
            )
        raise TypeError(
            "expected an EfficientNet of effnet_kernels, torchvision, timm or efficientnet_pytorch, "
            f"got {name_of(original_of(type(model)))}{hint}"
        )
    reason = deviation("the model", model)
    replaced = next((method for method in kind.methods if method in model.__dict__), None)
    if reason is None and replaced is not None:
        reason = f"the model had its {replaced} replaced"
    reason = reason or select.global_hook()
    if reason is not None:
        raise ValueError(reason)
    return kind.read(model, read_block)


def _kind_of(model: nn.Module) -> NetworkAdapter | None:
    """The adapter for a model's class, or for the class that it is derived from.

    Raises ValueError where the model's class has methods of its own in place of those that are known.
    """
    overridden: dict[str, type] = {}
    for base in type(model).__mro__:
        if base.__module__ == accelerated_classes.__name__:
            # A class that accelerate() mixes in computes the same as the class itself.
            continue
        kind = _NETWORKS.get(name_of(base))
        if kind is None:
            overridden |= dict.fromkeys(base.__dict__, base)
            continue
        own = next((method for method in ("__call__", *kind.methods) if method in overridden), None)
        if own is not None:
            raise ValueError(f"{name_of(overridden[own])} has a {own} of its own, which is not known")
        return kind
    return None


def _is_known(model: nn.Module) -> bool:
    try:
        return _kind_of(model) is not None
    except ValueError:
        return False


def read_block(name: str, module: nn.Module) -> Chain:
    """A block as a chain; raises ValueError with its name for one that is not known."""
    adapter = adapter_of(type(module))
    reason = deviation("it", module)
    if reason is None:
        try:
            if isinstance(module, FusedModule):
                return module.chain_spec().chain
            if adapter is not None:
                return adapter(module).chain
            reason = f"expected a block of an EfficientNet, got {type(module).__name__}"
        except Unsupported as unsupported:
            reason = str(unsupported)
    raise ValueError(f"{name}: {reason}")
