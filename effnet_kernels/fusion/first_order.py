"""What blocks and single operators have in common for autograd."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def first_order(backward: Backward, recorded: Backward | None = None) -> Backward:
    """Decorates a Function's ``backward(ctx, *grads)``, which computes with a backend's primitives.

    Where a second derivative is asked for, ``recorded``, which computes the same with operations that autograd records,
    takes its place; without it RuntimeError is raised. A batch of gradients is computed one by one: that is what
    ``torch.autograd.grad(is_grads_batched=True)``, a vectorized ``torch.autograd.functional.jacobian`` and a
    ``torch.vmap`` around a backward pass hand in.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
        if any(g is not None and _is_batched(g) for g in grads):
            return _looped(functools.partial(checked, ctx), grads)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if recorded is None:
            raise no_second_derivative("a single operator")
        return recorded(ctx, *grads)

    return checked


def no_second_derivative(of: str) -> RuntimeError:
    """The error where the second derivative of something is asked for that has none."""
    return RuntimeError(
        f"expected create_graph=False: {of} has no second derivative (effnet_kernels.use_backend('torch') has)"
    )


def _is_batched(g: Tensor) -> bool:
    return _functorch.is_legacy_batchedtensor(g) or _functorch.is_batchedtensor(g)


def _looped(backward: Backward, grads: Gradients) -> Gradients:
    """The gradients for each item of the innermost batch, as a batch again."""
    # There are two kinds of batches: those of torch.autograd's own loop and those of torch.vmap.
    legacy = any(g is not None and _functorch.is_legacy_batchedtensor(g) for g in grads)
    if legacy:
        level = max(level for g in grads if g is not None for level in _legacy_levels(g))
        unbatched = [g if g is None or level not in _legacy_levels(g) else _split_off(g, level) for g in grads]
    else:
        level = max(_functorch.maybe_get_level(g) for g in grads if g is not None)
        unbatched = [g if g is None else _moved_to_front(g, level) for g in grads]
    batched = [g is not None and u is not g for g, u in zip(grads, unbatched, strict=True)]
    size = next(u.shape[0] for u, is_batch in zip(unbatched, batched, strict=True) if u is not None and is_batch)
    items = [
        backward(*(u[i] if u is not None and is_batch else u for u, is_batch in zip(unbatched, batched, strict=True)))
        for i in range(size)
    ]
    add = torch._add_batch_dim if legacy else _functorch._add_batch_dim
    # Where one item has no gradient, none has.
    return tuple(
        None if column[0] is None else add(torch.stack(column), 0, level) for column in zip(*items, strict=True)
    )


def _legacy_levels(g: Tensor) -> list[int]:
    """The levels at which a gradient is a batch of torch.autograd's own loop; they count from one, up to 64.

    torch's counter of levels belongs to the thread that asked for the gradients, and autograd computes those of a GPU
    in another.
    """
    if not _functorch.is_legacy_batchedtensor(g):
        return []
    # Where there is no batch, torch makes one of the size that it is given.
    return [n for n in range(1, 65) if _split_off(g, n, size=1).shape[0] == _split_off(g, n, size=2).shape[0]]


def _split_off(g: Tensor, level: int, size: int = 1) -> Tensor:
    split: Tensor = torch._remove_batch_dim(g, level, size, 0)
    return split


def _moved_to_front(g: Tensor, level: int) -> Tensor:
    """A gradient with the batch of this level as its first dimension; itself where it is no batch of that level."""
    if not _functorch.is_batchedtensor(g) or _functorch.maybe_get_level(g) != level:
        return g
    inner, dimension = _functorch._unwrap_batched(g, level)
    return inner if dimension is None else inner.movedim(dimension, 0)
