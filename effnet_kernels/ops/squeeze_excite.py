"""Squeeze-and-excitation as one differentiable function."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import has_excitation
from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import Activation, Gate, Prologue
from effnet_kernels.ops.bn_act_add import bn_act_add
from effnet_kernels.ops.checks import check_map, fits_kernels
from effnet_kernels.ops.excite import check_excitation, excite
from effnet_kernels.ops.functions import SqueezeExcite
from effnet_kernels.ops.squeeze import squeeze


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation = "silu",
    gate: Gate = "sigmoid",
) -> Tensor:
    """``x * gate(w2 @ act(w1 @ mean(x) + b1) + b2)``: every channel scaled by a gate from all channels' means.

    Differentiable in x and in the parameters. Backward keeps x, the gate [N, C] and the hidden layer [N, S], and walks
    the map twice: once for the gate's gradient, once for that of x. Where the device has kernels, both directions run
    on those of this package's blocks (in a block the next convolution applies the gate as it loads, so that the gated
    map is never stored).

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 by the reference); channels-last is fastest.
        w1: [S, C] or [S, C, 1, 1], reduces to the S squeeze channels. b1: [S].
        w2: [C, S] or [C, S, 1, 1], expands again. b2: [C].
        act: the activation between them.
        gate: the activation that makes the gate.

    Returns:
        [N, C, H, W] in x's dtype. No buffers are updated.

    Raises:
        TypeError, ValueError: a dtype, shape, device or activation that does not fit.

    Source: Hu et al. 2018, section 3, equations 2 to 4.
    """
    check_map(x)
    check_excitation(x[:, :, 0, 0], w1, b1, w2, b2, act, gate)
    backend = select.operator_backend(x)
    if not has_excitation(backend, w1.shape[0]) or not fits_kernels(x, None, None, w1, b1, w2, b2):
        backend = "reference"
    if backend != "reference":
        layers = (None if t is None else as_contiguous(t) for t in (w1, b1, w2, b2))
        return SqueezeExcite.apply(primitives_of(backend), as_map(x), *layers, act, gate)
    return bn_act_add(x, Prologue(gate=excite(squeeze(x), w1, b1, w2, b2, act, gate)))
