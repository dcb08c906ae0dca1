"""The excitation: from pooled channels to a gate."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import has_excitation
from effnet_kernels.backends.operands import as_contiguous
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import ACTIVATIONS, GATES, Activation, Gate
from effnet_kernels.ops.checks import check_choice, check_shape, check_tensor, fits_kernels
from effnet_kernels.ops.functions import Excite


def excite(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation = "silu",
    gate: Gate = "sigmoid",
) -> Tensor:
    """The gate of squeeze-and-excitation: ``gate(w2 @ act(w1 @ pooled + b1) + b2)``, [N, C].

    Args:
        pooled: [N, C], fp32 (or fp64).
        w1: [S, C] or [S, C, 1, 1], reduces to the S squeeze channels. b1: [S].
        w2: [C, S] or [C, S, 1, 1], expands again. b2: [C].
        act: the activation between them.
        gate: the activation that makes the gate.

    Raises ValueError for shapes, devices or an activation that do not fit.
    Source: Hu et al. 2018, equation 3.
    """
    check_excitation(pooled, w1, b1, w2, b2, act, gate)
    backend = select.operator_backend(pooled)
    if not has_excitation(backend, w1.shape[0]) or not fits_kernels(pooled, None, None, w1, b1, w2, b2):
        backend = "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        operands = (None if t is None else as_contiguous(t) for t in (pooled, w1, b1, w2, b2))
        return Excite.apply(primitives, *operands, act, gate)
    return primitives.excite(pooled[:, None], 1, w1, b1, w2, b2, act, gate)[0]


def check_excitation(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation, gate: Gate
) -> None:
    """The shapes, dtypes and devices that :func:`excite` expects."""
    check_tensor(pooled, "pooled", "[N, C]")
    check_tensor(w1, "w1", "[S, C, 1, 1]" if isinstance(w1, Tensor) and w1.dim() == 4 else "[S, C]")
    check_choice(act, ACTIVATIONS, "act")
    check_choice(gate, GATES, "gate")
    squeezed, channels = w1.shape[0], pooled.shape[1]
    tail = (1, 1) if w1.dim() == 4 else ()
    check_shape(w1, (squeezed, channels, *tail), "w1", pooled)
    check_shape(b1, (squeezed,), "b1", pooled)
    check_tensor(w2, "w2", "[C, S, 1, 1]" if tail else "[C, S]")
    check_shape(w2, (channels, squeezed, *tail), "w2", pooled)
    check_shape(b2, (channels,), "b2", pooled)
