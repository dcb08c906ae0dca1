"""The fused chains as operators of torch, for those who trace instead of calling: torch.compile, fake tensors.

Eager calls go to :mod:`effnet_kernels.block` directly, because a registered operator costs microseconds a call. The
operators change nothing in place: running statistics follow outside, in torch's own operations.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from effnet_kernels import dispatch
from effnet_kernels.deferred import accumulation_dtype
from effnet_kernels.operands import as_map
from effnet_kernels.primitives import Primitives, PrimitivesBackend, primitives_of

if TYPE_CHECKING:
    from effnet_kernels.block import Buffers, Chain, Layer, Parameters

_library = library.Library("effnet_kernels", "DEF")
_library.define("chain_inference(Tensor x, Tensor[] parameters, Tensor[] buffers, str chain) -> Tensor")
_library.define("chain_forward(Tensor x, Tensor? keep, Tensor[] parameters, Tensor[] buffers, str chain) -> Tensor[]")
_library.define(
    "chain_backward(Tensor grad, Tensor x, Tensor? keep, Tensor[] parameters, Tensor[] stored, str chain, bool[] needs)"
    " -> Tensor[]"
)


def run_traced(
    backend: PrimitivesBackend,
    chain: "Chain",
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence["Parameters"],
    buffers: Sequence["Buffers"],
) -> Tensor:
    """:func:`effnet_kernels.block.run` as registered operators."""
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    flat = [t for own in parameters for t in own]
    # The functional operators read running statistics, where they are what is normalised by, and do not move them.
    read = [
        t
        for layer, norm in zip(chain.layers, buffers, strict=True)
        for t in ((None, None) if layer.batch_statistics else (norm.running_mean, norm.running_var))
    ]
    text = encode(backend, chain, [t is not None for t in (*flat, *read)])
    tensors = [t for t in flat if t is not None]
    running = [t for t in read if t is not None]
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    if not recorded and keep is None and not any(layer.batch_statistics for layer in chain.layers):
        return torch.ops.effnet_kernels.chain_inference(x, tensors, running, text)
    out, *stored = torch.ops.effnet_kernels.chain_forward(x, keep, tensors, running, text)
    position = 0
    for layer, norm in zip(chain.layers, buffers, strict=True):
        y, folded = (t.detach() for t in stored[position : position + 2])
        position += 2 if layer.excite_act is None else 5
        if layer.batch_statistics:
            _, _, mean, rstd = folded.unbind()
            _move_running_statistics(norm, mean, rstd, y.numel() // y.shape[1], layer)
    return out


def _move_running_statistics(norm: "Buffers", mean: Tensor, rstd: Tensor, count: int, layer: Any) -> None:
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    var = (rstd.pow(-2) - layer.eps).clamp_min(0.0) * (count / (count - 1))
    finite = torch.isfinite(mean) & torch.isfinite(var) if layer.skip_nonfinite else torch.ones_like(mean).bool()
    weight: float | Tensor = 0.0 if layer.momentum is None else layer.momentum
    if layer.momentum is None and norm.num_batches_tracked is not None:
        weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var)):
        running.copy_(torch.where(finite, (1.0 - weight) * running + weight * batch, running))


def encode(backend: PrimitivesBackend, chain: "Chain", present: Sequence[bool]) -> str:
    """The backend, the chain, and which of its tensors there are."""
    layers = ";".join(_encode_layer(layer) for layer in chain.layers)
    return f"{backend}|{int(chain.residual)},{int(chain.pool)}|{layers}|{''.join('1' if p else '0' for p in present)}"


def _encode_layer(layer: "Layer") -> str:
    padding = layer.padding if isinstance(layer.padding, str) else "/".join(str(side) for side in layer.padding)
    return (
        f"{layer.kind},{layer.stride},{padding},{layer.act},{layer.eps},{int(layer.batch_statistics)},"
        f"{layer.excite_act or ''},{layer.excite_gate}"
    )


@functools.lru_cache(maxsize=4096)
def _decode(text: str) -> tuple[Primitives, "Chain", str]:
    from effnet_kernels.block import Chain, Layer

    name, flags, layers, present = text.split("|")
    backend: Any = name
    residual, pool = flags.split(",")
    decoded: list[Layer] = []
    for entry in layers.split(";"):
        kind, stride, padding, act, eps, batch, excite_act, excite_gate = entry.split(",")
        kinds: Any = kind
        sides: Any = padding if padding == "same" else tuple(map(int, padding.split("/")))
        acts: Any = act
        excite: Any = excite_act or None
        gate: Any = excite_gate
        decoded.append(
            Layer(
                kinds,
                int(stride),
                sides,
                acts,
                float(eps),
                0.0,
                batch == "1",
                excite_act=excite,
                excite_gate=gate,
            )
        )
    return primitives_of(backend), Chain(tuple(decoded), residual == "1", pool == "1"), present


def _tensors(
    text: str, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
) -> tuple["Chain", list["Parameters"], list["Buffers"]]:
    """The chain with its tensors in place, None where there is none."""
    from effnet_kernels.block import Buffers, unflatten

    _, chain, present = _decode(text)
    width = len(present) - 2 * len(chain.layers)
    ours, running = iter(parameters), iter(buffers)
    flat = [next(ours) if p == "1" else None for p in present[:width]]
    read = [next(running, None) if p == "1" else None for p in present[width:]]
    pairs = zip(read[::2], read[1::2], strict=True)
    return chain, unflatten(flat), [Buffers(mean, var, None) for mean, var in pairs]


def _inference(x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], text: str) -> Tensor:
    from effnet_kernels import block

    chain, own, norms = _tensors(text, parameters, buffers)
    out = block.infer(_decode(text)[0], chain, as_map(x), own, norms)
    # An operator's outputs may not be its inputs.
    return out.clone() if out is x else out


def _forward(
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    text: str,
) -> list[Tensor]:
    from effnet_kernels import block

    chain, own, norms = _tensors(text, parameters, buffers)
    out, stored = block.forward(_decode(text)[0], chain, as_map(x), keep, own, norms)
    return [out, *(t.contiguous() if t.dim() < 4 else t for t in block.flatten_stored(stored))]


def _backward(
    grad: Tensor,
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Tensor],
    stored: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    from effnet_kernels import block

    chain, own, _ = _tensors(text, parameters, ())
    width = len(block.Parameters._fields)
    primitives, _, present = _decode(text)
    remaining = iter(needs[1:])
    flags = [p == "1" and next(remaining) for p in present[: width * len(chain.layers)]]
    rows = [flags[start : start + width] for start in range(0, len(flags), width)]
    kept = block.unflatten_stored(chain, stored)
    grad_x, gradients = block.backward(primitives, chain, grad, x, keep, own, kept, needs[0], rows)
    flat = [
        g
        for row, parameter_row in zip(gradients, own, strict=True)
        for g, p in zip(row, parameter_row, strict=True)
        if p is not None
    ]
    return [grad.new_empty(0) if g is None else g for g in (grad_x, *flat)]


def _map_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty((x.shape[0], channels, height, width)).contiguous(memory_format=torch.channels_last)


def _fake_maps(x: Tensor, chain: "Chain", own: Sequence["Parameters"]) -> list[Tensor]:
    """The raw outputs of the layers."""
    from effnet_kernels.geometry import output_map

    maps: list[Tensor] = []
    for layer, parameters in zip(chain.layers, own, strict=True):
        weight = parameters.weight
        height, width = output_map(x.shape[2], x.shape[3], weight.shape[-1], layer.stride, layer.padding)
        x = _map_like(x, weight.shape[0], height, width)
        maps.append(x)
    return maps


def _fake_output(chain: "Chain", last: Tensor) -> Tensor:
    return last.new_empty(last.shape[:2]) if chain.pool else torch.empty_like(last)


def _fake_inference(x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], text: str) -> Tensor:
    chain, own, _ = _tensors(text, parameters, buffers)
    return _fake_output(chain, _fake_maps(x, chain, own)[-1])


def _fake_forward(
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    text: str,
) -> list[Tensor]:
    chain, own, _ = _tensors(text, parameters, buffers)
    maps = _fake_maps(x, chain, own)
    stored: list[Tensor] = []
    dtype = accumulation_dtype(x.dtype)
    for layer, parameters_of_layer, y in zip(chain.layers, own, maps, strict=True):
        stored += [y, x.new_empty(4, y.shape[1], dtype=dtype)]
        if layer.excite_act is not None:
            assert parameters_of_layer.reduce_weight is not None
            squeezed = parameters_of_layer.reduce_weight.shape[0]
            stored += [x.new_empty(x.shape[0], size, dtype=dtype) for size in (y.shape[1], y.shape[1], squeezed)]
    return [_fake_output(chain, maps[-1]), *stored]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Tensor],
    stored: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (torch.empty_like(x, memory_format=torch.channels_last), *parameters)
    return [torch.empty_like(t) if n else grad.new_empty(0) for t, n in zip(inputs, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, keep, parameters, _, text = inputs
    ctx.text, ctx.number = text, len(parameters)
    ctx.needs = [x.requires_grad, *(p.requires_grad for p in parameters)]
    ctx.buffers = len(inputs[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, keep, *parameters, *output[1:])


def _autograd(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, keep, *rest = ctx.saved_tensors
    parameters, stored = rest[: ctx.number], rest[ctx.number :]
    grad_x, *gradients = torch.ops.effnet_kernels.chain_backward(
        grads[0], x, keep, parameters, stored, ctx.text, ctx.needs
    )
    needed = [g if n else None for g, n in zip((grad_x, *gradients), ctx.needs, strict=True)]
    return needed[0], None, needed[1:], [None] * ctx.buffers, None


for _name, _implementation, _fake in (
    ("chain_inference", _inference, _fake_inference),
    ("chain_forward", _forward, _fake_forward),
    ("chain_backward", _backward, _fake_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    library.register_fake(f"effnet_kernels::{_name}", _fake, lib=_library)
library.register_autograd("effnet_kernels::chain_forward", _autograd, setup_context=_setup_context, lib=_library)
