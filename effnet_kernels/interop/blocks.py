"""The known blocks of other packages, and their adapters."""

from functools import partial

from torch import nn

from effnet_kernels.fusion.accelerated_class import original_of
from effnet_kernels.fusion.inspection import Unsupported, methods_of
from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.interop import efficientnet_pytorch, timm, torchvision
from effnet_kernels.interop.adapters import Adapter, Pair, look_up, name_of, read_pair

_BLOCKS: dict[str, Adapter] = {**torchvision.BLOCKS, **timm.BLOCKS, **efficientnet_pytorch.BLOCKS}
ADAPTERS: dict[str, Adapter] = {name_of(Pair): read_pair, **torchvision.SINGLE_LAYERS, **_BLOCKS}
ADAPTER_MODULES = frozenset(name.rpartition(".")[0] for name in ADAPTERS)
"""Where the known classes are defined."""


def adapter_of(kind: type) -> Adapter | None:
    """The adapter for blocks of a class; None for other modules."""
    adapter = look_up(kind, ADAPTERS)
    return None if adapter is None else partial(_read, adapter)


def is_block(kind: type) -> bool:
    """Whether a class is a block of another package's networks, and not a single layer such as their stem."""
    return look_up(original_of(kind), _BLOCKS) is not None


def _read(adapter: Adapter, block: nn.Module) -> ChainSpec:
    """The chain that a block computes, if its class's forward is the one that the adapter knows."""
    _, patched = methods_of(type(block))
    if patched is not None:
        raise Unsupported(f"its class had its {patched} replaced")
    try:
        return adapter(block)
    except AttributeError as missing:
        raise Unsupported(str(missing)) from missing
