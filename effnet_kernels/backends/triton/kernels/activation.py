"""Activations and gates, and their derivatives."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def exp_of_negative(z):
    """exp(-z), in one multiplication and one instruction of the special function unit.

    tl.exp needs three more instructions, for denormal results, and a negation before it one more.
    """
    return libdevice.exp2(z * -1.4426950408889634)


@triton.jit
def sigmoid(z):
    # Below -88 the exponential overflows to infinity, and the quotient is 0, which is right.
    return libdevice.fast_dividef(1.0, 1.0 + exp_of_negative(z))


@triton.jit
def relu(z):
    """``max(z, 0)``, and NaN of NaN as torch has it, which tl.maximum would turn into 0."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu6(z):
    """``min(max(z, 0), 6)``, and NaN of NaN."""
    return tl.minimum(relu(z), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """``act(z)`` in fp32."""
    if ACT == "silu":
        z = libdevice.fast_dividef(z, 1.0 + exp_of_negative(z))
    elif ACT == "relu":
        z = relu(z)
    elif ACT == "relu6":
        z = relu6(z)
    elif ACT == "hardswish":
        z = z * relu6(z + 3.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACT == "none")
    return z


@triton.jit
def activate_and_differentiate(z, ACT: tl.constexpr):
    """``act(z)`` and ``act'(z)`` in fp32; at kinks and at NaN the derivatives are torch's."""
    if ACT == "silu":
        s = sigmoid(z)
        u = z * s
        derivative = s + u * (1.0 - s)
    elif ACT == "relu":
        u = relu(z)
        derivative = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACT == "relu6":
        u = relu6(z)
        derivative = tl.where((z <= 0.0) | (z >= 6.0), 0.0, 1.0)
    elif ACT == "hardswish":
        u = z * relu6(z + 3.0) * (1.0 / 6.0)
        inner = tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, 1.0)
        derivative = tl.where(z <= -3.0, 0.0, inner)
    else:
        tl.static_assert(ACT == "none")
        u = z
        derivative = tl.full(z.shape, 1.0, tl.float32)
    return u, derivative


@triton.jit
def gate_of(z, GATE: tl.constexpr):
    """Squeeze-and-excitation's gate, from its logit."""
    if GATE == "sigmoid":
        return sigmoid(z)
    return relu6(z + 3.0) * (1.0 / 6.0)


@triton.jit
def gate_derivative(gate, GATE: tl.constexpr):
    """The derivative of the gate by its logit, from the gate's value."""
    if GATE == "sigmoid":
        return gate * (1.0 - gate)
    return tl.where((gate > 0.0) & (gate < 1.0), 1.0 / 6.0, 0.0)
