"""The activations, the gates and their derivatives, by torch's own operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.fusion.spec import Activation, Gate

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
_aten = torch.ops.aten
_ACTIVATIONS_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, x: grad,
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0, 6),
    "hardswish": lambda grad, x: _aten.hardswish_backward(grad, x),
}


def activate(x: Tensor, act: Activation) -> Tensor:
    """``act(x)``, elementwise."""
    return _ACTIVATIONS[act](x)


def activation_backward(grad: Tensor, x: Tensor, act: Activation) -> Tensor:
    """``grad * act'(x)``, elementwise: the gradient of x from that of ``act(x)``, as autograd has it."""
    return _ACTIVATIONS_BACKWARD[act](grad, x)


def gate_of(logits: Tensor, gate: Gate) -> Tensor:
    """Squeeze-and-excitation's gate, elementwise."""
    return torch.sigmoid(logits) if gate == "sigmoid" else F.hardsigmoid(logits)


def gate_slope(value: Tensor, gate: Gate) -> Tensor:
    """The gate's derivative with respect to its logits, from the gate's ``value``."""
    if gate == "sigmoid":
        return value * (1.0 - value)
    return ((value > 0.0) & (value < 1.0)).to(value.dtype) * (1.0 / 6.0)
