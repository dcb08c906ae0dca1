"""Tensors as the kernels read them: values in memory, maps in channels-last strides, everything else contiguous."""

import torch
from torch import Tensor


def in_memory(t: Tensor) -> Tensor:
    """A tensor whose values are in its memory: torch keeps negations and zeros of some as a flag beside it."""
    return t.clone() if t.is_neg() or t._is_zerotensor() else t


def as_map(x: Tensor) -> Tensor:
    """A map [N, C, H, W] in channels-last strides, in memory; the same tensor where it is that already."""
    # in_memory(), without the call: a block asks this of every map.
    x = x.clone() if x.is_neg() or x._is_zerotensor() else x
    return x.contiguous(memory_format=torch.channels_last)


def as_contiguous(t: Tensor) -> Tensor:
    """A vector, a matrix or a weight, contiguous and in memory; the same tensor where it is that already."""
    return (t.clone() if t.is_neg() or t._is_zerotensor() else t).contiguous()


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in its parameter's dtype, shape and strides, as autograd's own are."""
    if gradient.dtype is not parameter.dtype or gradient.shape != parameter.shape:
        gradient = gradient.to(parameter.dtype).reshape(parameter.shape)
    if gradient.stride() == parameter.stride():
        return gradient
    if gradient.is_contiguous() and parameter.is_contiguous():
        # Their strides differ in dimensions of size 1 alone: of a 1x1 or a depthwise weight in channels-last strides.
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)
