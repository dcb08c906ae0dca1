"""A chain of convolutions as one autograd.Function over a backend's primitives: a block, a stem, a head.

Each layer is a convolution, a BatchNorm, an activation and, maybe, squeeze-and-excitation. Within the chain activations
stay deferred: only raw convolution outputs are stored and saved for backward. At its end the debt is paid once
(``merge``, with stochastic depth and the residual) or pooled away. The primitives know no autograd, so that the
residual's gradient is added inside the first convolution's data gradient and the squeeze's inside the depthwise
backward, where the autograd engine would add full maps.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import dispatch, profiling
from effnet_kernels.autograd import first_order
from effnet_kernels.batch_norm import check_batch, scale_and_shift
from effnet_kernels.deferred import (
    Activation,
    Epilogue,
    Gate,
    OutputGradient,
    Padding,
    Prologue,
    RunningStatistics,
    accumulation_dtype,
)
from effnet_kernels.geometry import output_map, resolve_padding
from effnet_kernels.operands import as_contiguous, as_map, in_memory, like_parameter
from effnet_kernels.primitives import Primitives, PrimitivesBackend, primitives_of


class Parameters(NamedTuple):
    """A layer's differentiable tensors. A chain takes them flat, layer by layer."""

    weight: Tensor  # [K, C, 1, 1], [C, 1, k, k] or dense [K, C, k, k]
    bias: Tensor | None = None  # [K]
    norm_weight: Tensor | None = None  # [K]
    norm_bias: Tensor | None = None  # [K]
    reduce_weight: Tensor | None = None  # [S, K, 1, 1], squeeze-and-excitation's first layer
    reduce_bias: Tensor | None = None  # [S]
    expand_weight: Tensor | None = None  # [K, S, 1, 1], its second
    expand_bias: Tensor | None = None  # [K]


class Buffers(NamedTuple):
    """The running statistics of a layer's BatchNorm. They are read, or written, in place."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class Layer(NamedTuple):
    """What is fixed about a layer.

    Attributes:
        kind: the convolution; a dense one is torch's and can only be the first of a chain.
        stride, padding: of the convolution; ``"same"`` is TensorFlow's padding, which follows from the map's size.
        act: the activation after BatchNorm.
        eps, momentum: BatchNorm's; no momentum averages over all batches.
        batch_statistics: whether BatchNorm normalises by the batch's statistics.
        skip_nonfinite: see :class:`~effnet_kernels.modules.ConvBnAct`.
        excite_act: the activation inside squeeze-and-excitation; None where there is none.
        excite_gate: what makes its gate.
    """

    kind: Literal["pointwise", "depthwise", "dense"]
    stride: int = 1
    padding: Padding | Literal["same"] = (0, 0, 0, 0)
    act: Activation = "none"
    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_statistics: bool = True
    skip_nonfinite: bool = False
    excite_act: Activation | None = None
    excite_gate: Gate = "sigmoid"


class Chain(NamedTuple):
    """Layers, and what happens at their end: the residual is added, or the map is pooled to [N, C].

    Squeeze-and-excitation is followed by a pointwise layer, whose load applies the gate.
    """

    layers: tuple[Layer, ...]
    residual: bool = False
    pool: bool = False


class Normalisation(NamedTuple):
    """BatchNorm of one forward pass, [K] each, fp32."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


class Excitation(NamedTuple):
    """Squeeze-and-excitation of one forward pass, fp32."""

    gate: Tensor  # [N, K]
    pooled: Tensor  # [N, K]
    hidden: Tensor  # [N, S]


class Stored(NamedTuple):
    """What backward needs of a layer."""

    y: Tensor  # the raw output
    folded: Tensor  # [4, K], the rows of its Normalisation
    excitation: Excitation | None


def run(
    backend: PrimitivesBackend,
    chain: Chain,
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Parameters],
    buffers: Sequence[Buffers],
) -> Tensor:
    """The chain of ``x`` [N, C, H, W] on a backend's primitives: with autograd where it is recording, else without.

    The output is in channels-last strides, the operands may have any. Under autocast the input is cast once, here; the
    kernels cast weights as they load them.

    Raises ValueError where BatchNorm would normalise a single value a channel by itself.
    """
    autocast = dispatch.autocast_dtype(x)
    if autocast is not None and backend == "reference":
        # The reference is made of torch's own functions, which autocast would cast again.
        with torch.autocast(x.device.type, enabled=False):
            return run(backend, chain, x.to(autocast), keep, parameters, buffers)
    x = as_map(x.to(autocast or x.dtype))
    if profiling.enabled() and backend != "reference":
        # A dense convolution is torch's own, or its primitive records it.
        profiling.record_convolutions(chain, parameters, x.shape, dense=False)
    primitives = primitives_of(backend)
    flat = [tensor for own in parameters for tensor in own]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in flat)):
        return ChainFunction.apply(primitives, chain, buffers, x, keep, *flat)
    with profiling.profiled(f"chain of {len(chain.layers)}"):
        if keep is None and not any(layer.batch_statistics for layer in chain.layers):
            return infer(primitives, chain, x, parameters, buffers)
        return forward(primitives, chain, x, keep, parameters, buffers)[0]


def infer(
    primitives: Primitives, chain: Chain, x: Tensor, parameters: Sequence[Parameters], buffers: Sequence[Buffers]
) -> Tensor:
    """The chain at inference: every BatchNorm is folded inside the convolution before it, from running statistics.

    Without running statistics a BatchNorm's weight and bias are the scale and the shift themselves.

    x [N, C, H, W] in channels-last strides to [N, K, H', W'], or [N, K] with ``chain.pool``.
    """
    parameters = _readable(chain, parameters)
    residual = x if chain.residual else None
    gate, sums = None, None
    for index, (layer, own, norm) in enumerate(zip(chain.layers, parameters, buffers, strict=True)):
        last = index == len(chain.layers) - 1
        statistics = None
        if norm.running_mean is not None and norm.running_var is not None:
            statistics = RunningStatistics(norm.running_mean.contiguous(), norm.running_var.contiguous(), layer.eps)
        epilogue = Epilogue(own.norm_weight, own.norm_bias, layer.act, None, statistics)
        reduction: Literal["none", "pool"] = "none" if layer.excite_act is None else "pool"
        if layer.kind == "pointwise":
            if last and chain.pool:
                _, sums = primitives.pointwise_conv(x, own.weight, own.bias, Prologue(gate=gate), epilogue, "pool")
                assert sums is not None
                return primitives.mean_of_sums(sums, x.shape[2] * x.shape[3]).to(x.dtype)
            epilogue = epilogue._replace(residual=residual if last else None)
            y, _ = primitives.pointwise_conv(x, own.weight, own.bias, Prologue(gate=gate), epilogue, "none")
            assert y is not None
            gate = None
        elif layer.kind == "depthwise":
            y, sums = primitives.depthwise_conv(
                x, own.weight, layer.stride, _padding(layer, x, own), Prologue(), epilogue, reduction
            )
        else:
            owed = Prologue(own.norm_weight, own.norm_bias, layer.act, None, statistics)
            y, _ = primitives.dense_conv(x, own.weight, own.bias, layer.stride, _padding(layer, x, own), "none")
            y = primitives.merge(y, owed, residual if last else None, None)
        if layer.excite_act is not None:
            if sums is None:
                sums = primitives.squeeze(y, Prologue())
            gate = _excite(primitives, layer, own, sums, y).gate
        x = y
    if chain.pool:
        return primitives.mean_of_sums(primitives.squeeze(x, Prologue()), x.shape[2] * x.shape[3]).to(x.dtype)
    return x


def forward(
    primitives: Primitives,
    chain: Chain,
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Parameters],
    buffers: Sequence[Buffers],
) -> tuple[Tensor, list[Stored]]:
    """The chain with activations deferred, and what backward needs. ``keep`` [N] is stochastic depth's factor."""
    parameters = _readable(chain, parameters)
    keep = None if keep is None else as_contiguous(keep)
    stored: list[Stored] = []
    residual = x if chain.residual else None
    owed = Prologue()
    _check_batch(chain, x, parameters)
    _count_batches(chain, buffers)
    for layer, own, norm in zip(chain.layers, parameters, buffers, strict=True):
        y, partials = _convolve(primitives, layer, x, own, owed)
        folded = _fold(primitives, layer, own, norm, partials, y.dtype)
        scale, shift, _, _ = folded.unbind()
        owed = Prologue(scale, shift, layer.act)
        excitation = None
        if layer.excite_act is not None:
            excitation = _excite(primitives, layer, own, primitives.squeeze(y, owed), y)
            owed = owed._replace(gate=excitation.gate)
        stored.append(Stored(y, folded, excitation))
        x = y
    if chain.pool:
        return primitives.mean_of_sums(primitives.squeeze(x, owed), x.shape[2] * x.shape[3]).to(x.dtype), stored
    return primitives.merge(x, owed, residual, keep), stored


def backward(
    primitives: Primitives,
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    keep: Tensor | None,
    parameters: Sequence[Parameters],
    stored: Sequence[Stored],
    needs_input: bool,
    needs_parameters: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """The gradient of ``x`` and those of each layer's :class:`Parameters`, where they are needed.

    ``docs/design.md`` derives it: BatchNorm's two sums and three coefficients, and squeeze-and-excitation's five sums.
    Gradients and saved tensors may come in other strides than they left in: hooks on saved tensors change them.
    """
    given, parameters = parameters, _readable(chain, parameters)
    grad = as_contiguous(grad) if chain.pool else as_map(grad)
    x, keep = as_map(x), None if keep is None else as_contiguous(keep)
    stored = [
        Stored(as_map(y), as_contiguous(folded), _readable_excitation(excitation)) for y, folded, excitation in stored
    ]
    last, norms = stored[-1], [Normalisation(*kept.folded.unbind()) for kept in stored]
    owed = OutputGradient(
        grad, last.y, keep=keep, scale=norms[-1].scale, shift=norms[-1].shift, act=chain.layers[-1].act
    )
    if chain.pool:
        offset = grad.to(accumulation_dtype(grad.dtype)) / (last.y.shape[2] * last.y.shape[3])
        owed = owed._replace(grad=None, offset=offset)
    sums = primitives.gradient_sums(owed, norms[-1].mean)
    gradients: list[list[Tensor | None]] = [[None] * len(Parameters._fields) for _ in chain.layers]
    grad_input: Tensor | None = None
    for index in reversed(range(len(chain.layers))):
        layer, own, own_gradients = chain.layers[index], parameters[index], gradients[index]
        needs_weight, needs_bias = needs_parameters[index][:2]
        y, norm = stored[index].y, norms[index]
        coefficients, norm_weight, norm_bias = primitives.fold_batch_norm_backward(
            sums, y.shape[0] * y.shape[2] * y.shape[3], own.norm_weight, norm.mean, norm.rstd, layer.batch_statistics
        )
        own_gradients[2], own_gradients[3] = norm_weight, norm_bias
        owed = owed._replace(coefficients=coefficients)
        if own.bias is not None and needs_bias:
            # The batch's mean takes a constant out again.
            own_gradients[1] = coefficients[0] * norm_bias * (0.0 if layer.batch_statistics else 1.0)
        if index == 0:
            residual = grad if chain.residual else None
            grad_input, own_gradients[0] = _first_backward(
                primitives, layer, owed, x, own, residual, needs_input, needs_weight
            )
            break
        before, norm_before = stored[index - 1], norms[index - 1]
        gate = None if before.excitation is None else before.excitation.gate
        prologue = Prologue(norm_before.scale, norm_before.shift, chain.layers[index - 1].act, gate)
        if layer.kind == "depthwise":
            assert before.excitation is None
            dz, norm_sums, own_gradients[0] = primitives.depthwise_conv_backward(
                owed,
                before.y,
                own.weight,
                layer.stride,
                _padding(layer, before.y, own),
                prologue,
                norm_before.mean,
                None,
            )
            assert norm_sums is not None
            owed, sums = OutputGradient(dz, before.y), norm_sums
            continue
        through = before.excitation is None
        dx, five, own_gradients[0] = primitives.pointwise_conv_backward(
            owed, own.weight, before.y, prologue, norm_before.mean, None, through, True, needs_weight
        )
        assert dx is not None
        assert five is not None
        if through:
            # Of the five sums, those of dz and dz * (y - mean).
            owed, sums = OutputGradient(dx, before.y), five[:, :, 1:4:2].flatten(0, 1)
        else:
            owed, sums, gradients[index - 1][4:] = _excite_backward(
                primitives, chain.layers[index - 1], before, norm_before, dx, five, parameters[index - 1]
            )
    return grad_input, [
        [
            None if g is None or p is None or not needed else like_parameter(g, p)
            for g, p, needed in zip(*row, strict=True)
        ]
        for row in zip(gradients, given, needs_parameters, strict=True)
    ]


class ChainFunction(torch.autograd.Function):
    """:func:`forward` and :func:`backward`, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        chain: Chain,
        buffers: Sequence[Buffers],
        x: Tensor,
        keep: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        out, stored = forward(primitives, chain, x, keep, unflatten(flat), buffers)
        ctx.chain, ctx.primitives = chain, primitives
        kept: list[Tensor | None] = list(flatten_stored(stored))
        if _recomputes(chain, x):
            kept[0] = None
        ctx.save_for_backward(x, keep, *flat, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        x, keep, *rest = ctx.saved_tensors
        width = len(Parameters._fields)
        # Hooks on saved tensors may give back any tensor of the same values; backward() brings the others in order.
        flat = [t if t is None or not t.is_neg() else in_memory(t) for t in rest[: width * len(chain.layers)]]
        kept = rest[width * len(chain.layers) :]
        parameters = unflatten(flat)
        if kept[0] is None:
            kept[0], _ = _convolve(ctx.primitives, chain.layers[0], as_map(x), parameters[0], Prologue())
        stored = unflatten_stored(chain, kept)
        needs = ctx.needs_input_grad
        needs_parameters = [needs[start : start + width] for start in range(5, len(needs), width)]
        grad_x, gradients = backward(
            ctx.primitives, chain, grad, x, keep, parameters, stored, needs[3], needs_parameters
        )
        return None, None, None, grad_x, None, *(gradient for layer in gradients for gradient in layer)


def unflatten(flat: Sequence[Any]) -> list[Parameters]:
    width = len(Parameters._fields)
    return [Parameters(*flat[start : start + width]) for start in range(0, len(flat), width)]


def flatten_stored(stored: Sequence[Stored]) -> list[Tensor]:
    return [tensor for y, folded, excitation in stored for tensor in (y, folded, *(excitation or ()))]


def unflatten_stored(chain: Chain, flat: Sequence[Tensor]) -> list[Stored]:
    remaining = iter(flat)
    return [
        Stored(
            next(remaining),
            next(remaining),
            None if layer.excite_act is None else Excitation(*itertools.islice(remaining, 3)),
        )
        for layer in chain.layers
    ]


def _readable(chain: Chain, parameters: Sequence[Parameters]) -> Sequence[Parameters]:
    """The parameters as the primitives read them; a dense convolution's weight may have any strides."""
    if all(map(Tensor.is_contiguous, [t for own in parameters for t in own if t is not None])):
        return parameters
    readable: list[Parameters] = []
    for layer, own in zip(chain.layers, parameters, strict=True):
        contiguous: Any = [None if t is None else as_contiguous(t) for t in own]
        contiguous[0] = own.weight if layer.kind == "dense" else contiguous[0]
        readable.append(Parameters(*contiguous))
    return readable


def _readable_excitation(excitation: Excitation | None) -> Excitation | None:
    return None if excitation is None else Excitation(*(as_contiguous(t) for t in excitation))


def _excitation_weights(own: Parameters) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    _, _, _, _, w1, b1, w2, b2 = own
    assert w1 is not None
    assert w2 is not None
    return w1, b1, w2, b2


def _excite(primitives: Primitives, layer: Layer, own: Parameters, sums: Tensor, y: Tensor) -> Excitation:
    """Of a map ``y``, from the partial sums over its pixels."""
    assert layer.excite_act is not None
    weights, count = _excitation_weights(own), y.shape[2] * y.shape[3]
    return Excitation(*primitives.excite(sums, count, *weights, layer.excite_act, layer.excite_gate))


def _convolve(
    primitives: Primitives, layer: Layer, x: Tensor, own: Parameters, owed: Prologue
) -> tuple[Tensor, Tensor | None]:
    reduction: Literal["statistics", "none"] = "statistics" if layer.batch_statistics else "none"
    if layer.kind == "pointwise":
        y, partials = primitives.pointwise_conv(x, own.weight, own.bias, owed, Epilogue(), reduction)
        assert y is not None
        return y, partials
    padding = _padding(layer, x, own)
    if layer.kind == "depthwise":
        return primitives.depthwise_conv(x, own.weight, layer.stride, padding, owed, Epilogue(), reduction)
    return primitives.dense_conv(x, own.weight, own.bias, layer.stride, padding, reduction)


def _padding(layer: Layer, x: Tensor, own: Parameters) -> Padding:
    """Of the layer's convolution for ``x``; raises ValueError where the kernel does not fit."""
    height, width, kernel = x.shape[2], x.shape[3], own.weight.shape[-1]
    padding = resolve_padding(layer.padding, (height, width), kernel, layer.stride)
    output_map(height, width, kernel, layer.stride, padding)
    return padding


def _fold(
    primitives: Primitives,
    layer: Layer,
    own: Parameters,
    norm: Buffers,
    partials: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A layer's Normalisation, [4, K], beside maps of ``dtype``: from the batch's statistics or the running ones."""
    mean, var = norm.running_mean, norm.running_var
    if partials is None:
        assert mean is not None
        assert var is not None
        if mean.dtype is torch.float64 and dtype is not torch.float64:
            raise ValueError(f"expected running statistics beside maps in {dtype}, got {mean.dtype}")
        vector = accumulation_dtype(dtype)
        rstd = torch.rsqrt(var.to(vector) + layer.eps)
        scale, shift = scale_and_shift(mean, rstd, own.norm_weight, own.norm_bias)
        return torch.stack([scale, shift, mean, rstd]).to(vector)
    momentum: float | Tensor | None = layer.momentum
    if momentum is None:
        momentum = 0.0 if norm.num_batches_tracked is None else norm.num_batches_tracked
    if mean is None or var is None:
        return primitives.fold_batch_norm(
            partials, own.norm_weight, own.norm_bias, None, None, momentum, layer.eps, layer.skip_nonfinite
        )
    moved_mean, moved_var = mean.contiguous(), var.contiguous()
    folded = primitives.fold_batch_norm(
        partials, own.norm_weight, own.norm_bias, moved_mean, moved_var, momentum, layer.eps, layer.skip_nonfinite
    )
    if moved_mean is mean and moved_var is var:
        # A kernel's writes are invisible to autograd unless it is told.
        torch.autograd.graph.increment_version([mean, var])
    else:
        mean.copy_(moved_mean)
        var.copy_(moved_var)
    return folded


def _check_batch(chain: Chain, x: Tensor, parameters: Sequence[Parameters]) -> None:
    """Raises torch's error, before any statistics move, where a BatchNorm would get a single value a channel."""
    size = x.shape
    if size[0] != 1:
        return
    for layer, own in zip(chain.layers, parameters, strict=True):
        kernel = own.weight.shape[-1]
        rows, columns = output_map(size[2], size[3], kernel, layer.stride, layer.padding)
        size = torch.Size((1, own.weight.shape[0], rows, columns))
        if layer.batch_statistics:
            check_batch(size)


def _count_batches(chain: Chain, buffers: Sequence[Buffers]) -> None:
    pairs = zip(chain.layers, buffers, strict=True)
    counts = [
        b.num_batches_tracked for layer, b in pairs if layer.batch_statistics and b.num_batches_tracked is not None
    ]
    if counts:
        torch._foreach_add_(counts, 1)


def _recomputes(chain: Chain, x: Tensor) -> bool:
    """Whether backward computes the first output anew: a stem's is large and cheap, and a GPU's memory scarce."""
    return chain.layers[0].kind == "dense" and x.shape[1] <= 4 and x.device.type != "cpu"


def _first_backward(
    primitives: Primitives,
    layer: Layer,
    owed: OutputGradient,
    x: Tensor,
    own: Parameters,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the chain's input and of its first convolution's weight."""
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    if layer.kind == "pointwise":
        grad_x, _, grad_weight = primitives.pointwise_conv_backward(
            owed, own.weight, x, Prologue(), None, residual, False, needs_input, needs_weight
        )
    elif layer.kind == "depthwise":
        if needs_input or needs_weight:
            grad_x, _, grad_weight = primitives.depthwise_conv_backward(
                owed, x, own.weight, layer.stride, _padding(layer, x, own), Prologue(), None, residual
            )
    else:
        grad_x, grad_weight = primitives.dense_conv_backward(
            owed, x, own.weight, layer.stride, _padding(layer, x, own), residual, needs_input, needs_weight
        )
    return grad_x if needs_input else None, grad_weight


def _excite_backward(
    primitives: Primitives, layer: Layer, before: Stored, norm: Normalisation, dq: Tensor, five: Tensor, own: Parameters
) -> tuple[OutputGradient, Tensor, list[Tensor | None]]:
    """What the layer that excites gets in turn: its output's gradient, the sums for its BatchNorm, four gradients."""
    assert before.excitation is not None
    assert layer.excite_act is not None
    gate, pooled, hidden = before.excitation
    count = before.y.shape[2] * before.y.shape[3]
    w1, _, w2, _ = _excitation_weights(own)
    offset, logits, dhidden, sums = primitives.excite_backward(
        five, count, gate, hidden, w1, w2, layer.excite_act, layer.excite_gate
    )
    assert sums is not None
    gradients: list[Tensor | None] = list(
        primitives.excite_backward_weight(logits, dhidden, hidden, pooled, layer.excite_act)
    )
    owed = OutputGradient(dq, before.y, None, gate, None, offset, norm.scale, norm.shift, layer.act)
    return owed, sums, gradients
