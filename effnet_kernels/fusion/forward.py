"""A chain's forward pass on a backend's primitives, which know no autograd: at inference and in training.

In training a convolution stores its raw output, and the norm, the activation and the gate behind it are the prologue of
the next one. At the chain's end ``bn_act_add`` applies them once, with stochastic depth and the residual, or the map is
pooled away.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from effnet_kernels.backends.base import Primitives, PrimitivesBackend
from effnet_kernels.backends.batch_norm import check_batch, scale_and_shift
from effnet_kernels.backends.cpu.dense import convolves_patches
from effnet_kernels.backends.cpu.memory import cast_map, runs_bf16
from effnet_kernels.backends.operands import as_contiguous
from effnet_kernels.backends.select import constant_when_traced
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion.geometry import output_map, resolve_padding
from effnet_kernels.fusion.spec import (
    BatchNorm,
    Chain,
    Epilogue,
    Layer,
    Padding,
    Prologue,
    RunningStatistics,
    accumulation_dtype,
)
from effnet_kernels.fusion.synchronisation import gather_statistics, group_of, is_synchronised


class Gating(NamedTuple):
    """Squeeze-and-excitation of one forward pass, fp32."""

    gate: Tensor  # [N, K]
    pooled: Tensor  # [N, K]
    hidden: Tensor  # [N, S]
    slopes: Tensor | None = None  # [N, T, 2, K]: partial sums of the activation's slopes, where backward wants them


class Saved(NamedTuple):
    """What backward needs of a layer."""

    y: Tensor  # the raw output
    norm: Tensor  # [4, K]: scale, shift, mean and rstd, fp32; synchronised [5, K], with the number of values
    gating: Gating | None


def flatten(saved: Sequence[Saved]) -> list[Tensor]:
    """The tensors that a forward pass saves, layer by layer."""
    return [t for y, norm, gating in saved for t in (y, norm, *(gating or ())) if t is not None]


def unflatten(chain: Chain, tensors: Sequence[Tensor]) -> list[Saved]:
    """The other way round."""
    excitations = sum(layer.excitation is not None for layer in chain.layers)
    # Either all have slopes or none.
    of_gating = (len(tensors) - 2 * len(chain.layers)) // max(excitations, 1)
    remaining = iter(tensors)
    return [
        Saved(
            next(remaining),
            next(remaining),
            None if layer.excitation is None else Gating(*itertools.islice(remaining, of_gating)),
        )
        for layer in chain.layers
    ]


def infer(
    primitives: Primitives,
    chains: Sequence[Chain],
    x: Tensor,
    plans: Plans | None = None,
    tensors: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Chains at inference, of which each reads the output of the one before.

    Every BatchNorm is folded into the epilogue of its convolution, from running statistics. x [N, C, H, W] in
    channels-last strides to [N, K, H', W'], or [N, K] where the last chain pools. ``plans`` are those of these chains,
    on the Triton backend, and ``tensors`` all of the chains' (:meth:`.spec.Chain.all_tensors`), if the caller has them.

    Raises ValueError as :func:`check_input` does.
    """

    if tensors is None:
        chains = [contiguous(chain) for chain in chains]

    def compute() -> list[Tensor | None]:
        y = x
        for chain in chains:
            check_input(chain, y)
            y = _infer(primitives, contiguous(chain), y)
        return [y]

    if plans is None or chains[0].layers[0].kind == "dense":
        (out,) = compute()
    else:
        read = [t for chain in chains for t in chain.all_tensors()] if tensors is None else tensors
        (out,) = plans.run(("infer", chains[-1].pool), [x, *read], compute)
    assert out is not None
    return out.to(x.dtype) if chains[-1].pool else out


def _infer(primitives: Primitives, chain: Chain, x: Tensor) -> Tensor:
    """:func:`infer`, but for a cast of pooled means from fp32."""
    residual = x if chain.residual else None
    gate = None
    for index, layer in enumerate(chain.layers):
        sums = None
        last = index == len(chain.layers) - 1
        epilogue, bias = _epilogue(layer)
        reduction: Literal["none", "pool"] = "none" if layer.excitation is None else "pool"
        if layer.kind == "pointwise":
            if last and chain.pool:
                _, sums = primitives.pointwise_conv(x, layer.weight, bias, Prologue(gate=gate), epilogue, "pool")
                assert sums is not None
                return primitives.mean_of_sums(sums, x.shape[2] * x.shape[3])
            epilogue = epilogue._replace(residual=residual if last else None)
            y, _ = primitives.pointwise_conv(x, layer.weight, bias, Prologue(gate=gate), epilogue, "none")
            assert y is not None
            gate = None
        elif layer.kind == "depthwise":
            padding = padding_for(layer, x)
            y, sums = primitives.depthwise_conv(x, layer.weight, layer.stride, padding, Prologue(), epilogue, reduction)
            if last and residual is not None:
                y = primitives.bn_act_add(y, Prologue(), residual, None)
        else:
            prologue = Prologue(epilogue.scale, epilogue.shift, epilogue.act, None, epilogue.statistics)
            y, _ = primitives.dense_conv(x, layer.weight, bias, layer.stride, padding_for(layer, x), "none")
            y = primitives.bn_act_add(y, prologue, _beside(residual, y) if last else None, None)
        if layer.excitation is not None:
            if sums is None:
                sums = primitives.squeeze(y, Prologue())
            gate = _excite(primitives, layer, sums, y).gate
        x = y
    if chain.pool:
        return primitives.mean_of_sums(primitives.squeeze(x, Prologue()), x.shape[2] * x.shape[3])
    return x


def forward(
    primitives: Primitives, chain: Chain, x: Tensor, drop_path_scale: Tensor | None, plans: Plans | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The chain in training: its output, and what backward needs, the tensors of :class:`Saved` layer by layer.

    x [N, C, H, W] in channels-last strides, ``drop_path_scale`` [N], to :func:`infer`'s output. Running statistics are
    updated where their norms track them. ``plans`` are the chain's, on the Triton backend.

    Raises ValueError where BatchNorm would normalise a single value a channel by itself.
    """
    chain = contiguous(chain)
    drop_path_scale = None if drop_path_scale is None else as_contiguous(drop_path_scale)
    if chain.batch_statistics:
        _check_batch(chain, x)
        _count_batches(chain)
    first = None
    layer = chain.layers[0]
    if plans is not None and layer.kind == "dense":
        # A plan has launches of kernels alone, and this convolution is torch's.
        first, _ = convolve(primitives, layer, x, Prologue(), "none")

    def compute() -> list[Tensor | None]:
        out, saved = _forward(primitives, chain, x, drop_path_scale, first)
        return [out, *flatten(saved)]

    if plans is None:
        results = compute()
    else:
        read = [x, drop_path_scale, first, *chain.all_tensors()]
        results = plans.run(("forward", chain.pool), read, compute)
    out, *saved = cast(list[Tensor], results)
    # Pooled means are in fp32.
    return out.to(x.dtype) if chain.pool else out, saved


def _forward(
    primitives: Primitives, chain: Chain, x: Tensor, drop_path_scale: Tensor | None, first: Tensor | None
) -> tuple[Tensor, list[Saved]]:
    """The passes of :func:`forward`; ``first`` is the first layer's raw output, or None where it is to be computed."""
    saved: list[Saved] = []
    residual = x if chain.residual else None
    prologue = Prologue()
    for layer in chain.layers:
        reduction: Literal["statistics", "none"] = "statistics" if layer.batch_statistics else "none"
        if first is not None and not saved:
            y, partials = first, primitives.channel_statistics(first) if layer.batch_statistics else None
        else:
            y, partials = convolve(primitives, layer, x, prologue, reduction)
        norm = _normalise(primitives, layer, partials, y.dtype)
        scale, shift, *_ = norm.unbind()
        prologue = Prologue(scale, shift, layer.act)
        gating = None
        if layer.excitation is not None:
            sums, slopes = primitives.squeeze_for_backward(y, prologue, norm[2])
            gating = _excite(primitives, layer, sums, y)._replace(slopes=slopes)
            prologue = prologue._replace(gate=gating.gate)
        saved.append(Saved(y, norm, gating))
        x = y
    if chain.pool:
        return primitives.mean_of_sums(primitives.squeeze(x, prologue), x.shape[2] * x.shape[3]), saved
    return primitives.bn_act_add(x, prologue, _beside(residual, x), drop_path_scale), saved


def check_input(chain: Chain, x: Tensor) -> None:
    """Raises ValueError where x does not have the channels, the device or the dtype of a chain's weights."""
    weight, channels = chain.layers[0].weight, chain.layers[0].in_channels
    if x.shape[1] != channels:
        raise ValueError(f"expected an input [N, {channels}, H, W], got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"expected the input on {weight.device}, where the weights are, got {x.device}")
    if x.dtype is weight.dtype or (weight.dtype is torch.float32 and x.dtype is not torch.float64):
        return
    if torch.float64 in (x.dtype, weight.dtype) or not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"expected an input in {weight.dtype}, the dtype of the weights, got {x.dtype}")


def dtype_of_input(backend: PrimitivesBackend, chain: Chain, dtypes: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    """The dtype of a chain's input: the one in which it is computed, except before a dense convolution.

    ``dtypes`` are those of :func:`.select.chain_dtypes`. Under autocast on a CPU with instructions for bfloat16 that
    convolution and its gradients are computed in it, by torch, in a fraction of float32's time; its output and all
    behind it are in float32.
    """
    computed, returned = dtypes
    if backend != "cpu" or returned is not torch.bfloat16:
        return computed
    first = chain.layers[0]
    in_bf16 = first.kind == "dense" and not convolves_patches(first.weight) and has_bf16()
    return returned if in_bf16 else computed


def _beside(residual: Tensor | None, y: Tensor) -> Tensor | None:
    """The residual in the dtype of the map that it is added to, which need not be :func:`dtype_of_input`."""
    return None if residual is None else cast_map(residual, y.dtype)


@constant_when_traced
def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    return runs_bf16()


def contiguous(chain: Chain) -> Chain:
    """The chain with parameters as the primitives read them; a dense convolution's weight may have any strides."""
    parameters = chain.parameters()
    if all(map(Tensor.is_contiguous, [t for t in parameters if t is not None])):
        return chain
    made = chain.with_parameters([None if t is None else as_contiguous(t) for t in parameters])
    first = chain.layers[0]
    if first.kind == "dense":
        made = made._replace(layers=(made.layers[0]._replace(weight=first.weight), *made.layers[1:]))
    return made


def convolve(
    primitives: Primitives, layer: Layer, x: Tensor, prologue: Prologue, reduction: Literal["statistics", "none"]
) -> tuple[Tensor, Tensor | None]:
    """A layer's raw output, and the partial statistics of it where they are asked for."""
    if layer.kind == "pointwise":
        y, partials = primitives.pointwise_conv(x, layer.weight, layer.bias, prologue, Epilogue(), reduction)
        assert y is not None
        return y, partials
    padding = padding_for(layer, x)
    if layer.kind == "depthwise":
        return primitives.depthwise_conv(x, layer.weight, layer.stride, padding, prologue, Epilogue(), reduction)
    return primitives.dense_conv(x, layer.weight, layer.bias, layer.stride, padding, reduction)


def padding_for(layer: Layer, x: Tensor) -> Padding:
    """Of the layer's convolution for ``x``; raises ValueError where the kernel does not fit."""
    height, width, kernel = x.shape[2], x.shape[3], layer.kernel_size
    padding = resolve_padding(layer.padding, (height, width), kernel, layer.stride)
    output_map(height, width, kernel, layer.stride, padding)
    return padding


def _epilogue(layer: Layer) -> tuple[Epilogue, Tensor | None]:
    """What follows the convolution at inference, and the convolution's own bias."""
    norm = layer.norm
    if norm is None:
        return Epilogue(shift=layer.bias, act=layer.act), None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    statistics = RunningStatistics(norm.running_mean.contiguous(), norm.running_var.contiguous(), norm.eps)
    return Epilogue(norm.weight, norm.bias, layer.act, None, statistics), layer.bias


def _excite(primitives: Primitives, layer: Layer, sums: Tensor, y: Tensor) -> Gating:
    """Of a map ``y``, from the partial sums over its pixels."""
    assert layer.excitation is not None
    return Gating(*primitives.excite(sums, y.shape[2] * y.shape[3], *layer.excitation))


def _normalise(primitives: Primitives, layer: Layer, partials: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A layer's scale, shift, mean and rstd, [4, K], beside maps of ``dtype``; see :class:`Saved`.

    They follow from the batch's statistics, or from the running ones where there are no ``partials``.
    """
    norm = layer.norm
    assert norm is not None
    mean, var = norm.running_mean, norm.running_var
    if partials is None:
        assert mean is not None
        assert var is not None
        if mean.dtype is torch.float64 and dtype is not torch.float64:
            raise ValueError(f"expected running statistics beside maps in {dtype}, got {mean.dtype}")
        vector = accumulation_dtype(dtype)
        rstd = torch.rsqrt(var.to(vector) + norm.eps)
        scale, shift = scale_and_shift(mean, rstd, norm.weight, norm.bias)
        return torch.stack([scale, shift, mean, rstd]).to(vector)
    group = group_of(norm)
    if group is None:
        return _finalize(primitives, norm, partials)
    gathered = gather_statistics(primitives.merge_statistics(partials), group)
    return torch.cat([_finalize(primitives, norm, gathered), gathered[:, 0].sum(0, keepdim=True)])


def _finalize(primitives: Primitives, norm: BatchNorm, partials: Tensor) -> Tensor:
    """Scale, shift, mean and rstd, [4, K], from partial statistics, and the running statistics moved.

    As with torch's own batch_norm, autograd does not see that they have moved: nothing that it keeps reads them.
    """
    mean, var = norm.running_mean, norm.running_var
    momentum: float | Tensor | None = norm.momentum
    if momentum is None:
        momentum = 0.0 if norm.num_batches_tracked is None else norm.num_batches_tracked
    if mean is None or var is None or not norm.tracks:
        return primitives.finalize_batch_norm(
            partials, norm.weight, norm.bias, None, None, momentum, norm.eps, norm.skip_nonfinite
        )
    moved_mean, moved_var = mean.contiguous(), var.contiguous()
    normalised = primitives.finalize_batch_norm(
        partials, norm.weight, norm.bias, moved_mean, moved_var, momentum, norm.eps, norm.skip_nonfinite
    )
    if moved_mean is not mean or moved_var is not var:
        mean.data.copy_(moved_mean)
        var.data.copy_(moved_var)
    return normalised


def _check_batch(chain: Chain, x: Tensor) -> None:
    """Raises torch's error, before any statistics move, where a BatchNorm would get a single value a channel."""
    size = x.shape
    if size[0] != 1:
        return
    for layer in chain.layers:
        rows, columns = output_map(size[2], size[3], layer.kernel_size, layer.stride, layer.padding)
        size = torch.Size((1, layer.out_channels, rows, columns))
        if layer.batch_statistics and not is_synchronised(layer):
            check_batch(size)


def _count_batches(chain: Chain) -> None:
    counts = [norm.num_batches_tracked for norm in _tracking(chain) if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)


def _tracking(chain: Chain) -> list[BatchNorm]:
    """The norms whose running statistics a pass with the batch's statistics updates."""
    norms = [layer.norm for layer in chain.layers if layer.norm is not None]
    return [norm for norm in norms if norm.batch_statistics and norm.tracks]
