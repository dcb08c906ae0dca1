"""The single operators on a backend's kernels, for autograd: thin Functions over the primitives that the blocks use.

Maps come in channels-last strides. Statistics are one differentiable [3, C] (count, mean, M2): their gradient is an
affine function of the raw output, which the convolution's backward forms on load.
"""

from typing import Any

import torch
from torch import Tensor

from effnet_kernels.backends.base import Primitives
from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.fusion.first_order import first_order
from effnet_kernels.fusion.spec import (
    Activation,
    Epilogue,
    Gate,
    OutputGradient,
    Padding,
    Prologue,
    Reduction,
)


class PointwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        gate: Tensor | None,
        act: Activation,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor | None]:
        prologue = Prologue(scale, shift, act, gate)
        ctx.primitives = primitives
        y, partials = primitives.pointwise_conv(x, weight, bias, prologue, Epilogue(), reduction)
        assert y is not None
        stats = None if partials is None else primitives.merge_statistics(partials)
        ctx.save_for_backward(x, weight, bias, scale, shift, gate, y, stats)
        ctx.act = act
        return y, stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, gate, y, stats = ctx.saved_tensors
        x, y = as_map(x), as_map(y)
        weight, scale, shift, gate = _contiguous(weight, scale, shift, gate)
        needs = ctx.needs_input_grad[1:]
        gradient = _with_statistics(grad, y, stats, grad_stats)
        grad_x = grad_scale = grad_shift = grad_gate = grad_bias = None
        prologue = Prologue(scale, shift, ctx.act, gate)
        plain = scale is None and shift is None and gate is None and ctx.act == "none"
        needs_input = needs[0] or any(needs[3:6])
        zero = _zeros(x) if needs_input and not plain else None
        dz, sums, grad_weight = ctx.primitives.pointwise_conv_backward(
            gradient, weight, x, prologue, zero, None, not plain, needs_input, needs[1]
        )
        if sums is not None:
            of_gate, of_shift, of_scale, *_ = sums.sum(dim=1).unbind(1)
            factor = torch.ones_like(of_gate) if gate is None else gate
            grad_gate = of_gate
            grad_shift, grad_scale = (factor * of_shift).sum(dim=0), (factor * of_scale).sum(dim=0)
        if dz is not None and needs[0]:
            grad_x = dz if plain else _scaled(ctx.primitives, dz, scale)
        if needs[2]:
            grad_bias = _bias_gradient(grad, grad_stats)
        gradients = (grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_gate)
        return None, *_cast(needs, gradients, (x, weight, bias, scale, shift, gate)), None, None


class DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        act: Activation,
        stride: int,
        padding: Padding,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor | None]:
        prologue = Prologue(scale, shift, act)
        ctx.primitives = primitives
        y, partials = primitives.depthwise_conv(x, weight, stride, padding, prologue, Epilogue(), reduction)
        stats = None if partials is None else primitives.merge_statistics(partials)
        ctx.save_for_backward(x, weight, scale, shift, y, stats)
        ctx.act, ctx.stride, ctx.padding = act, stride, padding
        return y, stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, y, stats = ctx.saved_tensors
        x, y = as_map(x), as_map(y)
        weight, scale, shift = _contiguous(weight, scale, shift)
        needs = ctx.needs_input_grad[1:]
        gradient = _with_statistics(grad, y, stats, grad_stats)
        zero = _zeros(x) if any(needs[2:4]) else None
        prologue = Prologue(scale, shift, ctx.act)
        dz, sums, grad_weight = ctx.primitives.depthwise_conv_backward(
            gradient, x, weight, ctx.stride, ctx.padding, prologue, zero, None
        )
        grad_scale = grad_shift = None
        if sums is not None:
            grad_shift, grad_scale = sums.sum(dim=0)
        grad_x = _scaled(ctx.primitives, dz, scale) if needs[0] else None
        gradients = (grad_x, grad_weight, grad_scale, grad_shift)
        return None, *_cast(needs, gradients, (x, weight, scale, shift)), None, None, None, None


class Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, primitives: Primitives, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: Activation
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.act = act
        ctx.primitives = primitives
        sums = primitives.squeeze(x, Prologue(scale, shift, act))
        return primitives.mean_of_sums(sums, x.shape[2] * x.shape[3])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors
        x = as_map(x)
        offset, scale, shift = _contiguous(grad / (x.shape[2] * x.shape[3]), scale, shift)
        gradient = OutputGradient(None, x, None, None, None, offset, scale, shift, ctx.act)
        gradients = _through_affine(ctx.primitives, ctx.needs_input_grad[1:4], gradient, x)
        return None, *_cast(ctx.needs_input_grad[1:], gradients, (x, scale, shift)), None


class BnActAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        drop_path_scale: Tensor | None,
        act: Activation,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, drop_path_scale)
        ctx.act = act
        ctx.primitives = primitives
        return primitives.bn_act_add(x, Prologue(scale, shift, act), residual, drop_path_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, drop_path_scale = ctx.saved_tensors
        x, grad = as_map(x), as_map(grad)
        scale, shift, drop_path_scale = _contiguous(scale, shift, drop_path_scale)
        gradient = OutputGradient(grad, x, None, None, drop_path_scale, None, scale, shift, ctx.act)
        gradients = _through_affine(ctx.primitives, ctx.needs_input_grad[1:4], gradient, x)
        residual = grad if ctx.needs_input_grad[4] else None
        return None, *_cast(ctx.needs_input_grad[1:], gradients, (x, scale, shift)), residual, None, None


class Excite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        pooled: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        act: Activation,
        kind: Gate,
    ) -> Tensor:
        ctx.primitives = primitives
        gate, pooled, hidden = primitives.excite(pooled[:, None], 1, w1, b1, w2, b2, act, kind)
        ctx.save_for_backward(pooled, w1, b1, w2, b2, gate, hidden)
        ctx.act, ctx.kind = act, kind
        return gate

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pooled, w1, b1, w2, b2, gate, hidden = _contiguous(*ctx.saved_tensors)
        primitives = ctx.primitives
        sums = as_contiguous(grad)[:, None, None]
        grad_pooled, logits, dhidden, _ = primitives.excite_backward(sums, 1, gate, hidden, w1, w2, ctx.act, ctx.kind)
        weights = primitives.excite_backward_weight(logits, dhidden, hidden, pooled, ctx.act)
        gradients = (grad_pooled, *weights)
        return None, *_cast(ctx.needs_input_grad[1:], gradients, (pooled, w1, b1, w2, b2)), None, None


class SqueezeExcite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        primitives: Primitives,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        act: Activation,
        kind: Gate,
    ) -> Tensor:
        ctx.primitives = primitives
        sums = primitives.squeeze(x, Prologue())
        gate, pooled, hidden = primitives.excite(sums, x.shape[2] * x.shape[3], w1, b1, w2, b2, act, kind)
        ctx.save_for_backward(x, w1, b1, w2, b2, gate, pooled, hidden)
        ctx.act, ctx.kind = act, kind
        return primitives.bn_act_add(x, Prologue(gate=gate), None, None)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *vectors = ctx.saved_tensors
        x, grad = as_map(x), as_map(grad)
        w1, b1, w2, b2, gate, pooled, hidden = _contiguous(*vectors)
        primitives = ctx.primitives
        sums = primitives.squeeze(x, Prologue(), grad)
        offset, logits, dhidden, _ = primitives.excite_backward(
            sums[:, :, None], x.shape[2] * x.shape[3], gate, hidden, w1, w2, ctx.act, ctx.kind
        )
        weights = primitives.excite_backward_weight(logits, dhidden, hidden, pooled, ctx.act)
        grad_x = primitives.apply_gradient(OutputGradient(grad, gate=gate, offset=offset), None)
        return None, *_cast(ctx.needs_input_grad[1:], (grad_x, *weights), (x, w1, b1, w2, b2)), None, None


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """Saved tensors as the primitives read them: hooks on saved tensors may have changed their strides."""
    return [None if t is None else as_contiguous(t) for t in tensors]


def _zeros(x: Tensor) -> Tensor:
    """[C], fp32, beside a map [N, C, H, W]."""
    return torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)


def _with_statistics(grad: Tensor, y: Tensor, stats: Tensor | None, grad_stats: Tensor | None) -> OutputGradient:
    """The output's gradient with that of its statistics: g + g_mean / M + 2 * g_M2 * (y - mean)."""
    grad = as_map(grad)
    if stats is None or grad_stats is None:
        return OutputGradient(grad, y)
    count, mean, _ = stats
    beta = 2.0 * grad_stats[2]
    coefficients = torch.stack([torch.ones_like(beta), beta, grad_stats[1] / count - beta * mean])
    return OutputGradient(grad, y, coefficients)


def _bias_gradient(grad: Tensor, grad_stats: Tensor | None) -> Tensor:
    # The part that comes through M2 sums to zero, because it is made of deviations from the mean.
    bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32)
    return bias if grad_stats is None else bias + grad_stats[1]


def _scaled(primitives: Primitives, dz: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return dz
    coefficients = torch.stack([scale.float(), torch.zeros_like(scale), torch.zeros_like(scale)])
    return primitives.apply_gradient(OutputGradient(dz, dz, coefficients), None)


def _through_affine(
    primitives: Primitives, needs: tuple[bool, ...], gradient: OutputGradient, x: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x, scale and shift, where act(scale * x + shift) got this gradient."""
    grad_x = grad_scale = grad_shift = None
    if needs[1] or needs[2]:
        zero = _zeros(x)
        grad_shift, grad_scale = primitives.gradient_sums(gradient, zero).sum(dim=0)
    if needs[0]:
        if gradient.scale is not None:
            scale = gradient.scale.float()
            nothing = torch.zeros_like(scale)
            gradient = gradient._replace(coefficients=torch.stack([scale, nothing, nothing]))
        grad_x = primitives.apply_gradient(gradient, None)
    return grad_x, grad_scale, grad_shift


def _cast(
    needs: tuple[bool, ...], gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients in the shapes and dtypes of their inputs; None where one is not needed."""
    return [
        g.to(t.dtype).reshape(t.shape) if needed and g is not None and t is not None else None
        for needed, g, t in zip(needs, gradients, inputs, strict=False)
    ]
