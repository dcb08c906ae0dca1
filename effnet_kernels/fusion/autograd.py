"""A chain for autograd: one Function over a backend's primitives, or its inference where nothing is recorded."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends import profiling, select
from effnet_kernels.backends.base import PrimitivesBackend
from effnet_kernels.backends.cpu.memory import cast_map, runs_bf16
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion import custom_ops
from effnet_kernels.fusion.backward import backward
from effnet_kernels.fusion.first_order import first_order, no_second_derivative
from effnet_kernels.fusion.forward import check_input, convolve, dtype_of_input, forward, infer, unflatten
from effnet_kernels.fusion.packing import PackedChains
from effnet_kernels.fusion.spec import Chain, Prologue
from effnet_kernels.fusion.synchronisation import is_synchronised


def run(
    backend: PrimitivesBackend,
    chain: Chain,
    x: Tensor,
    drop_path_scale: Tensor | None,
    packed: PackedChains | None = None,
    plans: Plans | None = None,
) -> Tensor:
    """The chain of x [N, C, H, W] on a backend's primitives, called or traced, with autograd where it is recording.

    The output is in channels-last strides, the operands may have any. Under autocast the input is cast once, here, and
    the output has autocast's dtype; primitives cast weights as they load them. Maps of lower precision go with float32
    weights, as under autocast.

    Raises ValueError where the channels, the device or the dtype are not those of the weights, which a kernel would not
    notice, and where BatchNorm would normalise a single value a channel by itself.
    """
    check_input(chain, x)
    if backend == "cpu" and drop_path_scale is not None:
        # Drawn in the input's dtype, which need not be float32 under autocast.
        drop_path_scale = drop_path_scale.float()
    if torch.compiler.is_compiling():
        return custom_ops.run(backend, chain, x, drop_path_scale)
    return _run(backend, chain, x, drop_path_scale, packed, plans if backend == "triton" else None)


def _run(
    backend: PrimitivesBackend,
    chain: Chain,
    x: Tensor,
    drop_path_scale: Tensor | None,
    packed: PackedChains | None,
    plans: Plans | None,
) -> Tensor:
    """:func:`run` without its checks, called and not traced."""
    dtypes = select.chain_dtypes(backend, x)
    x = as_map(x)
    if profiling.enabled() and backend != "reference":
        # A dense convolution is torch's own, or its primitive records it.
        profiling.record_convolutions(chain, x.shape, dense=False)
    # Autocast would cast the operands of the torch functions that a backend calls. The Triton backend calls one, the
    # dense convolution, whose operands have one dtype already: it need not wait for the switch.
    with contextlib.nullcontext() if backend == "triton" else select.without_autocast(x):
        if torch.is_grad_enabled():
            parameters = chain.parameters()
            if x.requires_grad or any(t is not None and t.requires_grad for t in parameters):
                return ChainFunction.apply(backend, chain, dtypes, plans, x, drop_path_scale, *parameters)
        returned = dtypes[1]
        computed = dtype_of_input(backend, chain, dtypes)
        with profiling.profiled(f"chain of {len(chain.layers)}"):
            if drop_path_scale is None and not chain.batch_statistics:
                if packed is not None and backend == "cpu":
                    for dtype in packed_dtypes(dtypes):
                        found = packed.infer([chain], cast(backend, x, dtype))
                        if found is not None:
                            return cast(backend, found, returned)
                out = infer(primitives_of(backend), [chain], cast(backend, x, computed), plans)
            else:
                out, _ = forward(primitives_of(backend), chain, cast(backend, x, computed), drop_path_scale, plans)
        return cast(backend, out, returned)


def infer_packed(chain: Chain, x: Tensor, packed: PackedChains | None) -> Tensor | None:
    """The chain of x [N, C, H, W] in eval mode by its packed network, in the dtype of x; None where there is none.

    For what the primitives of the CPU do not compute: bfloat16 without autocast. Raises ValueError as :func:`run` does.
    """
    check_input(chain, x)
    if packed is None:
        return None
    if profiling.enabled():
        profiling.record_convolutions(chain, x.shape, dense=False)
    with profiling.profiled(f"chain of {len(chain.layers)}"):
        return packed.infer([chain], as_map(x))


def packed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[torch.dtype, ...]:
    """The dtypes in which packed networks compute a chain, the preferred one first.

    Under autocast in bfloat16 they compute in it where they can: unlike the primitives they have kernels for it, and
    take about half the time.
    """
    computed, returned = dtypes
    return (returned, computed) if returned is torch.bfloat16 and runs_bf16() else (computed,)


def _unpacked(ctx: Any) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[Tensor]]:
    """The input, the factors of stochastic depth, the parameters, and what the forward pass has kept."""
    x, drop_path_scale, *rest = ctx.saved_tensors
    number = len(ctx.biases)
    parameters = [t for pair in zip(rest[:number], ctx.biases, strict=True) for t in pair]
    return x, drop_path_scale, parameters, rest[number:]


def _recorded_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`ChainFunction` by operations that autograd records, for a second derivative.

    The forward pass is computed once more, by the reference.
    """
    x, drop_path_scale, parameters, kept = _unpacked(ctx)
    _, _, _, _, needs_input, _, *needs = ctx.needs_input_grad
    if x.dtype is not ctx.input_dtype:
        raise no_second_derivative("a block whose input autocast casts")
    if any(map(is_synchronised, ctx.chain.layers)):
        raise no_second_derivative("a block whose BatchNorm is synchronised")
    if ctx.versions != [None if t is None else t._version for t in ctx.biases]:
        raise RuntimeError("a bias was modified by an in-place operation, and a second derivative reads its value")
    inputs = [x, *parameters]
    chain = _with_fixed_statistics(ctx.chain.with_parameters(parameters), kept)
    with select.without_autocast(x):
        out, _ = forward(primitives_of("reference"), chain, as_map(x), drop_path_scale)
        wanted = [t for t, n in zip(inputs, (needs_input, *needs), strict=True) if n and t is not None]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True, allow_unused=True))
    grad_x, *gradients = [next(found) if n else None for n in (needs_input, *needs)]
    return None, None, None, None, grad_x, None, *gradients


def _with_fixed_statistics(chain: Chain, kept: list[Tensor]) -> Chain:
    """The chain, which moves no running statistics, and reads those of the forward pass that has kept these."""
    layers = []
    for layer, saved in zip(chain.layers, unflatten(chain, kept), strict=True):
        norm = layer.norm
        if norm is not None and norm.batch_statistics:
            norm = norm._replace(tracks=False)
        elif norm is not None:
            _, _, mean, rstd, *_ = saved.norm
            norm = norm._replace(running_mean=mean, running_var=rstd.pow(-2) - norm.eps)
        layers.append(layer._replace(norm=norm))
    return chain._replace(layers=tuple(layers))


class ChannelsLast(torch.autograd.Function):
    """A contiguous map in channels-last strides, whose gradient is contiguous, as that of torch's convolutions is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """A map in channels-last strides, itself where it has them; its gradient comes in its own strides."""
    if x.requires_grad and x.is_contiguous() and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        converted: Tensor = x if x.is_contiguous(memory_format=torch.channels_last) else ChannelsLast.apply(x)
        return converted
    return x.contiguous(memory_format=torch.channels_last)


class ChainFunction(torch.autograd.Function):
    """:func:`forward` and :func:`backward` for autograd, between casts from and to :func:`.select.chain_dtypes`."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: PrimitivesBackend,
        chain: Chain,
        dtypes: tuple[torch.dtype, torch.dtype],
        plans: Plans | None,
        x: Tensor,
        drop_path_scale: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        computed, returned = dtypes
        ctx.chain, ctx.backend, ctx.computed, ctx.input_dtype, ctx.plans = chain, backend, computed, x.dtype, plans
        x = cast(backend, x, dtype_of_input(backend, chain, dtypes))
        out, saved = forward(primitives_of(backend), chain, x, drop_path_scale, plans)
        kept: list[Tensor | None] = list(saved)
        if _recomputes(chain, x):
            kept[0] = None
        # Backward reads no values of biases, and those that are saved must not change before it.
        ctx.biases = parameters[1::2]
        ctx.versions = [None if t is None else t._version for t in ctx.biases]
        ctx.save_for_backward(x, drop_path_scale, *parameters[::2], *kept)
        return cast(backend, out, returned)

    @staticmethod
    @functools.partial(first_order, recorded=_recorded_gradients)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, drop_path_scale, parameters, kept = _unpacked(ctx)
        _, _, _, _, needs_input, _, *needs = ctx.needs_input_grad
        chain = ctx.chain
        primitives, grad = primitives_of(ctx.backend), cast(ctx.backend, grad, ctx.computed)
        # A backward pass may be started under autocast too.
        with select.without_autocast(x):
            if kept[0] is None:
                first = chain.with_parameters(parameters).layers[0]
                kept[0], _ = convolve(primitives, first, as_map(x), Prologue(), "none")
            grad_x, gradients = backward(
                primitives, chain, parameters, grad, x, drop_path_scale, kept, needs_input, needs, ctx.plans
            )
        grad_x = None if grad_x is None else cast(ctx.backend, grad_x, ctx.input_dtype)
        return None, None, None, None, grad_x, None, *gradients


def cast(backend: PrimitivesBackend, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A map, or a pooled one, in another dtype, without autograd."""
    # Tensor.to takes as long to find out that there is nothing to do as ten of these comparisons.
    if x.dtype is dtype:
        return x
    return cast_map(x, dtype) if backend == "cpu" and x.dim() == 4 else x.to(dtype)


def _recomputes(chain: Chain, x: Tensor) -> bool:
    """Whether backward computes the first output anew: a stem's is large and cheap, and a GPU's memory scarce."""
    first = chain.layers[0]
    return first.kind == "dense" and first.bias is None and x.shape[1] <= 4 and x.device.type != "cpu"
