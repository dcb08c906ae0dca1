"""Tiles of maps as rows of channels, and the gradient of a raw output formed on such a tile."""

import triton
import triton.language as tl

from effnet_kernels.triton.kernels.activation import activate_and_differentiate


@triton.jit
def load_vector(ptr, channels, mask, DEFAULT: tl.constexpr):
    """A vector's values at ``channels`` in fp32; the default everywhere where there is no vector."""
    value = tl.full(channels.shape, DEFAULT, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + channels, mask=mask, other=DEFAULT).to(tl.float32)
    return value


@triton.jit
def load_row(ptr, sample, C, channels, mask, DEFAULT: tl.constexpr):
    """Row ``sample`` of an [N, C] matrix at ``channels``, as :func:`load_vector`."""
    value = tl.full(channels.shape, DEFAULT, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + sample.to(tl.int64) * C + channels, mask=mask, other=DEFAULT).to(tl.float32)
    return value


@triton.jit
def gradient_of_norm(grad_ptr, y, offsets, mask, gate, keep, offset, scale, shift, ACT: tl.constexpr):
    """``dz`` of :class:`~effnet_kernels.deferred.OutputGradient` on a tile: y [BLOCK_M, BLOCK_C], vectors [BLOCK_C]."""
    if grad_ptr is not None:
        dz = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * (gate * keep)[None, :] + offset[None, :]
    else:
        dz = tl.zeros(y.shape, tl.float32) + offset[None, :]
    if ACT != "none":
        _, derivative = activate_and_differentiate(y * scale[None, :] + shift[None, :], ACT)
        dz *= derivative
    return dz
