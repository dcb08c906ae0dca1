"""Which backend runs each layer of a model, and why."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select
from effnet_kernels.backends.select import Backend, Call
from effnet_kernels.interop.accelerate import why_left_alone
from effnet_kernels.interop.accelerated_classes import AcceleratedNetwork, pair_of
from effnet_kernels.interop.blocks import adapter_of
from effnet_kernels.modules.fused_module import FusedModule, description


class Row(NamedTuple):
    """One layer: its name in the model, its class, the backend that runs it, and the reason."""

    name: str
    module: str
    backend: Backend
    reason: str


class Explanation(list[Row]):
    """The layers in the model's order; printed as a table."""

    def __str__(self) -> str:
        header = Row("layer", "module", "backend", "reason")  # type: ignore[arg-type]
        widths = [max(len(str(row[i])) for row in [header, *self]) for i in range(3)]
        return "\n".join(
            "  ".join([*(str(cell).ljust(width) for cell, width in zip(row, widths, strict=False)), row.reason])
            for row in [header, *self]
        )


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Which backend would compute each layer of ``model(x)`` in the model's present mode, and why.

    Nothing is run: the answer follows from the model, from the dtype, device and rank of ``x`` and from what
    is forced. Layers that are not this package's are torch's own; where :func:`~effnet_kernels.accelerate` knows a
    block and has not switched it, the reason says why.

    Args:
        model: any module; this package's layers are recognised wherever they are in it.
        x: the model's input, [N, C, H, W]; None for one of the device and dtype of the model's parameters.

    Raises:
        TypeError: ``x`` is no tensor.
        BackendError: a backend is forced that cannot run one of the layers.
    """
    rows = Explanation()
    call = _call(model, x)
    for name, layer in _layers(model, ""):
        row: tuple[Backend, str]
        if isinstance(layer, FusedModule):
            decision = layer.decide(call)
            row = decision.backend, description(decision)
        elif adapter_of(type(layer)) is not None:
            left_alone = why_left_alone(layer)
            row = "torch", f"left alone: {left_alone}" if left_alone else "not accelerated"
        else:
            row = "torch", "not a layer of this package"
        rows.append(Row(name or "(model)", type(layer).__name__, *row))
    return rows


def _call(model: nn.Module, x: Tensor | None) -> Call:
    if x is not None:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected the model's input as a tensor [N, C, H, W], got {type(x).__name__}")
        intercepted = select.interception(x)
        return Call.of(x) if intercepted is None else Call(x.device, x.dtype, intercepted)
    parameter = next(model.parameters(), None)
    if parameter is None:
        return Call(torch.device("cpu"), torch.float32, None)
    return Call(parameter.device, parameter.dtype, None)


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, AcceleratedNetwork):
        pairs = {names[0]: pair_of(module, index) for index, names in enumerate(module.pairs)}
        hidden = {name for names in module.pairs for name in names[1:]}
        children = [(child, pairs.get(child, inner)) for child, inner in children if child not in hidden]
    if isinstance(module, FusedModule) or adapter_of(type(module)) is not None or not children:
        yield name, module
        return
    for child_name, child in children:
        yield from _layers(child, f"{name}.{child_name}" if name else child_name)
