"""The fused chains as operators of torch, for those who trace instead of calling: torch.compile, fake tensors.

Eager calls go to :mod:`effnet_kernels.fusion.autograd` directly, because a registered operator costs microseconds a
call. The operators change nothing in place: running statistics follow outside, in torch's own operations.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, library

from effnet_kernels.backends import select
from effnet_kernels.backends.base import Primitives, PrimitivesBackend
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.backward import backward
from effnet_kernels.fusion.forward import Saved, dtype_of_input, flatten, forward, infer, unflatten
from effnet_kernels.fusion.geometry import output_map
from effnet_kernels.fusion.packing import packed_for
from effnet_kernels.fusion.spec import PARAMETERS_OF_A_LAYER, BatchNorm, Chain, Excitation, Layer, accumulation_dtype
from effnet_kernels.fusion.synchronisation import is_synchronised

_library = library.Library("effnet_kernels", "DEF")
_library.define("chain_inference(Tensor x, Tensor[] parameters, Tensor[] running, str chain) -> Tensor")
_library.define(
    "chain_forward(Tensor x, Tensor? drop_path_scale, Tensor[] parameters, Tensor[] running, str chain) -> Tensor[]"
)
_library.define(
    "chain_backward(Tensor grad, Tensor x, Tensor? drop_path_scale, Tensor[] parameters, Tensor[] saved, str chain,"
    " bool[] needs) -> Tensor[]"
)


def run(backend: PrimitivesBackend, chain: Chain, x: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """:func:`effnet_kernels.fusion.autograd.run` as registered operators."""
    dtypes = select.chain_dtypes(backend, x)
    x, returned = x.to(dtype_of_input(backend, chain, dtypes)), dtypes[1]
    text, parameters, running = encode(backend, chain)
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in parameters))
    if not recorded and drop_path_scale is None and not chain.batch_statistics:
        return torch.ops.effnet_kernels.chain_inference(x, parameters, running, text).to(returned)
    out, *saved = torch.ops.effnet_kernels.chain_forward(x, drop_path_scale, parameters, running, text)
    for layer, kept in zip(chain.layers, unflatten(chain, [t.detach() for t in saved]), strict=True):
        if layer.norm is not None and layer.norm.batch_statistics and layer.norm.tracks:
            _, _, mean, rstd, *counts = kept.norm.unbind()
            count = counts[0] if counts else kept.y.numel() // kept.y.shape[1]
            _update_running_statistics(layer.norm, mean, rstd, count)
    return out.to(returned)


def _update_running_statistics(norm: BatchNorm, mean: Tensor, rstd: Tensor, count: int | Tensor) -> None:
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    var = (rstd.pow(-2) - norm.eps).clamp_min(0.0) * (count / (count - 1))
    finite = torch.isfinite(mean) & torch.isfinite(var) if norm.skip_nonfinite else torch.ones_like(mean).bool()
    weight: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and norm.num_batches_tracked is not None:
        weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var)):
        running.copy_(torch.where(finite, (1.0 - weight) * running + weight * batch, running))


def encode(backend: PrimitivesBackend, chain: Chain) -> tuple[str, list[Tensor], list[Tensor]]:
    """The chain as an operator takes it: a text, its parameters, and the running statistics that it normalises by.

    The text is a Python literal. Each layer is its kind, stride, padding and activation, then eps, whether batch
    statistics are used and by which processes, the excitation's activation and gate, and which of its ten tensors there
    are.
    """
    layers = ""
    running: list[Tensor] = []
    for layer in chain.layers:
        norm, excitation = layer.norm, layer.excitation
        # Statistics that only move are updated outside of the operators.
        read = [] if norm is None or norm.batch_statistics else [norm.running_mean, norm.running_var]
        present = [t is not None for t in (*layer.parameters(), *(read or (None, None)))]
        running += [t for t in read if t is not None]
        # Formatted one by one: a tracer of open sizes holds numbers as symbols until they are.
        padding = "'same'" if isinstance(layer.padding, str) else ", ".join(f"{side}" for side in layer.padding)
        layers += f"(('{layer.kind}', {layer.stride}, ({padding}), '{layer.act}'), "
        group = norm.process_group if norm is not None and is_synchronised(layer) else None
        layers += "None, " if norm is None else f"({norm.eps}, {norm.batch_statistics}, {group!r}), "
        layers += "None, " if excitation is None else f"('{excitation.act}', '{excitation.gate}'), "
        layers += f"({', '.join(f'{p}' for p in present)})), "
    text = f"('{backend}', {chain.residual}, {chain.pool}, [{layers}])"
    return text, [t for t in chain.parameters() if t is not None], running


class Decoded:
    """What a text of :func:`encode` says."""

    def __init__(self, text: str) -> None:
        self.backend, self.residual, self.pool, self.layers = ast.literal_eval(text)
        self.primitives: Primitives = primitives_of(self.backend)
        self.present = [p for *_, present in self.layers for p in present[:PARAMETERS_OF_A_LAYER]]

    def chain(self, parameters: Sequence[Tensor], running: Sequence[Tensor]) -> Chain:
        """The chain with these tensors in their places."""
        own, read = iter(parameters), iter(running)
        layers: list[Layer] = []
        for (kind, stride, padding, act), norm, excitation, present in self.layers:
            weight, bias, norm_weight, norm_bias, *rest = (
                next(own) if p else None for p in present[:PARAMETERS_OF_A_LAYER]
            )
            mean, var = (next(read, None) if p else None for p in present[PARAMETERS_OF_A_LAYER:])
            assert weight is not None
            layers.append(
                Layer(
                    kind,
                    weight,
                    bias,
                    stride,
                    padding,
                    None if norm is None else _norm(norm_weight, norm_bias, mean, var, *norm),
                    act,
                    None if excitation is None else Excitation(*cast(Any, rest), *excitation),
                )
            )
        return Chain(tuple(layers), self.residual, self.pool)


def _norm(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    batch_statistics: bool,
    process_group: str | None,
) -> BatchNorm:
    return BatchNorm(
        weight, bias, mean, var, eps=eps, momentum=0.0, batch_statistics=batch_statistics, process_group=process_group
    )


_decode: Callable[[str], Decoded] = functools.lru_cache(maxsize=4096)(Decoded)


def _inference(x: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], text: str) -> Tensor:
    decoded = _decode(text)
    chain, x = decoded.chain(parameters, running), as_map(x)
    # Primitives answer in float32 on a CPU, packed networks in the input's dtype.
    if decoded.backend == "cpu" and x.dtype is torch.float32:
        packed = packed_for(text, chain).infer([chain], x)
        if packed is not None:
            return packed
    out = infer(decoded.primitives, [chain], x)
    # An operator's outputs may not be its inputs.
    return out.clone() if out is x else out


def _forward(
    x: Tensor,
    drop_path_scale: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    text: str,
) -> list[Tensor]:
    decoded = _decode(text)
    chain = decoded.chain(parameters, running)
    out, saved = forward(decoded.primitives, chain, as_map(x), drop_path_scale)
    kept = flatten([_with_one_sum_of_slopes(layer) for layer in unflatten(chain, saved)])
    return [out, *(t.contiguous() if t.dim() < 4 else t for t in kept)]


def _with_one_sum_of_slopes(saved: Saved) -> Saved:
    """A backend chooses the number of partial sums, and an operator's outputs have one shape."""
    gating = saved.gating
    if gating is None or gating.slopes is None:
        return saved
    return saved._replace(gating=gating._replace(slopes=gating.slopes.sum(dim=1, keepdim=True)))


def _backward(
    grad: Tensor,
    x: Tensor,
    drop_path_scale: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    decoded = _decode(text)
    chain = decoded.chain(parameters, ())
    remaining = iter(needs[1:])
    needs_parameters = [p and next(remaining) for p in decoded.present]
    grad_x, gradients = backward(
        decoded.primitives, chain, chain.parameters(), grad, x, drop_path_scale, saved, needs[0], needs_parameters
    )
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    own = [g for g, p in zip(gradients, decoded.present, strict=True) if p]
    return [grad.new_empty(0) if g is None else g for g in (grad_x, *own)]


def _fake_maps(x: Tensor, chain: Chain, backend: PrimitivesBackend) -> list[Tensor]:
    """The raw outputs of the layers; on a CPU they are in float32, whatever a dense convolution is computed in."""
    maps: list[Tensor] = []
    x = x.float() if backend == "cpu" else x
    for layer in chain.layers:
        height, width = output_map(x.shape[2], x.shape[3], layer.kernel_size, layer.stride, layer.padding)
        x = x.new_empty((x.shape[0], layer.out_channels, height, width)).contiguous(memory_format=torch.channels_last)
        maps.append(x)
    return maps


def _fake_output(chain: Chain, last: Tensor) -> Tensor:
    return last.new_empty(last.shape[:2]) if chain.pool else torch.empty_like(last)


def _fake_inference(x: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], text: str) -> Tensor:
    decoded = _decode(text)
    chain = decoded.chain(parameters, running)
    return _fake_output(chain, _fake_maps(x, chain, decoded.backend)[-1])


def _fake_forward(
    x: Tensor,
    drop_path_scale: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    text: str,
) -> list[Tensor]:
    decoded = _decode(text)
    chain = decoded.chain(parameters, running)
    maps = _fake_maps(x, chain, decoded.backend)
    saved: list[Tensor] = []
    dtype = accumulation_dtype(x.dtype)
    for layer, y in zip(chain.layers, maps, strict=True):
        saved += [y, x.new_empty(5 if is_synchronised(layer) else 4, y.shape[1], dtype=dtype)]
        if layer.excitation is not None:
            squeezed = layer.excitation.reduce_weight.shape[0]
            saved += [x.new_empty(x.shape[0], size, dtype=dtype) for size in (y.shape[1], y.shape[1], squeezed)]
            if decoded.backend == "triton":
                saved.append(x.new_empty(x.shape[0], 1, 2, y.shape[1], dtype=dtype))
    return [_fake_output(chain, maps[-1]), *saved]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    drop_path_scale: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (torch.empty_like(x, memory_format=torch.channels_last), *parameters)
    return [torch.empty_like(t) if n else grad.new_empty(0) for t, n in zip(inputs, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, drop_path_scale, parameters, _, text = inputs
    ctx.text, ctx.number = text, len(parameters)
    ctx.needs = [x.requires_grad, *(p.requires_grad for p in parameters)]
    ctx.running = len(inputs[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, drop_path_scale, *parameters, *output[1:])


def _autograd(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, drop_path_scale, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.number], rest[ctx.number :]
    grad_x, *gradients = torch.ops.effnet_kernels.chain_backward(
        grads[0], x, drop_path_scale, parameters, saved, ctx.text, ctx.needs
    )
    needed = [g if n else None for g, n in zip((grad_x, *gradients), ctx.needs, strict=True)]
    return needed[0], None, needed[1:], [None] * ctx.running, None


def _outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Casts are the caller's: a graph may be run under the autocast that it was traced under."""

    @functools.wraps(implementation)
    def run_outside(first: Tensor, *arguments: Any) -> Any:
        with select.without_autocast(first):
            return implementation(first, *arguments)

    return run_outside


for _name, _implementation, _fake in (
    ("chain_inference", _inference, _fake_inference),
    ("chain_forward", _forward, _fake_forward),
    ("chain_backward", _backward, _fake_backward),
):
    _library.impl(_name, _outside_autocast(_implementation), "CompositeExplicitAutograd")
    library.register_fake(f"effnet_kernels::{_name}", _fake, lib=_library)
library.register_autograd("effnet_kernels::chain_forward", _autograd, setup_context=_setup_context, lib=_library)
