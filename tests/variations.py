"""The same tensor in other memory, and tensors that are not what they should be."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def other_memory(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of t's values in every kind of legal memory, with names: orders of dimensions, gaps, offsets, flags."""
    for order in itertools.permutations(range(t.dim())):
        inverse = [order.index(i) for i in range(t.dim())]
        yield f"order {order}", t.permute(order).contiguous().permute(inverse)
    for dimension in range(t.dim()):
        for step in (2, 3):
            size = list(t.shape)
            size[dimension] *= step
            wide = t.new_full(size, 7)
            slices = [slice(None)] * t.dim()
            slices[dimension] = slice(step - 1, None, step)
            wide[tuple(slices)] = t
            yield f"step {step} in dimension {dimension}", wide[tuple(slices)]
    flat = t.new_full((t.numel() + 1,), 7)
    flat[1:] = t.reshape(-1)
    yield "offset by one", flat[1:].view(t.shape)
    if t.numel() > 0 and t.dim() > 0 and bool((t == t.flatten()[0]).all()):
        yield "one value, expanded", t.flatten()[0].clone().expand(t.shape)
    if t.is_floating_point() and t.dtype != torch.bfloat16:
        yield "negated lazily", torch._neg_view(-t)


def misfits(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a kernel which reads t's memory must not be given, with names."""
    for dtype in (torch.float64, torch.float16, torch.int32):
        yield str(dtype), t.to(dtype)
    yield "meta", t.to("meta")
    for dimension in range(t.dim()):
        if t.shape[dimension] > 1:
            yield f"dimension {dimension} halved", t.narrow(dimension, 0, t.shape[dimension] // 2).clone()
        yield f"dimension {dimension} doubled", torch.cat([t, t], dim=dimension)
    yield "one dimension less", t.flatten(0, 1) if t.dim() > 1 else t[0]
    yield "one dimension more", t[None]
    yield "a lazy zero", torch._efficientzerotensor(t.shape, dtype=t.dtype)
    yield "negated lazily", torch._neg_view(-t)
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    yield "freed", freed
