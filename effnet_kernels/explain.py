"""What runs, layer by layer, and why."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from effnet_kernels import dispatch
from effnet_kernels.dispatch import Backend, Call
from effnet_kernels.modules.operator_module import OperatorModule


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


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Which backend would compute each layer of ``model(x)`` in the model's present mode, and why.

    Nothing is run: the answer follows from the model, from the dtype, device and rank of ``x`` and from what
    is forced. Layers that are not this package's are torch's own.

    Args:
        model: any module; this package's layers are recognised wherever they are in it.
        x: the model's input, [N, C, H, W].

    Raises:
        BackendError: a backend is forced that cannot run one of the layers.
    """
    rows = Explanation()
    call = Call.of(x)
    for name, layer in _layers(model, ""):
        if isinstance(layer, OperatorModule):
            decision = dispatch.decide(layer, call)
        else:
            decision = dispatch.Decision("torch", "not a layer of this package")
        rows.append(Row(name or "(model)", type(layer).__name__, *decision))
    return rows


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if isinstance(module, OperatorModule) or not children:
        yield name, module
        return
    for child_name, child in children:
        yield from _layers(child, f"{name}.{child_name}" if name else child_name)
