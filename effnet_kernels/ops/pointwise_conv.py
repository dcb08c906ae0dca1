"""The 1x1 convolution of a deferred activation."""

import torch
from torch import Tensor

from effnet_kernels import cpu, dispatch, reference
from effnet_kernels.deferred import REDUCTIONS, Epilogue, Prologue, Reduction
from effnet_kernels.ops.checks import (
    any_requires_grad,
    check_choice,
    check_epilogue,
    check_map,
    check_prologue,
    check_shape,
    check_tensor,
    fits_triton,
)


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """1x1 convolution of a deferred activation (the expand and project convolutions of MBConv).

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; channels-last is fastest.
        weight: [K, C, 1, 1].
        bias: [K].
        prologue: what is owed to ``x``, paid on load.
        epilogue: what is applied to the output before it is stored.
        reduction: ``"statistics"`` returns the [3, K] count, mean and M2 of the stored output beside it; ``"pool"``
            returns the spatial mean [N, K] instead of the output.

    Returns:
        ``(y [N, K, H, W], None)``, ``(y, stats [3, K])`` or ``(pooled [N, K], None)``.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.

    Source: Sandler et al. 2018 (MobileNetV2), section 3.3; Tan and Le 2019 (EfficientNet), section 4.
    """
    check_map(x)
    check_choice(reduction, REDUCTIONS, "reduction")
    check_tensor(weight, "weight", "[K, C, 1, 1]")
    check_shape(weight, (weight.shape[0], x.shape[1], 1, 1), "weight", x)
    check_shape(bias, (weight.shape[0],), "bias", x)
    check_prologue(prologue, x)
    check_epilogue(epilogue, x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
    if dispatch.runs_on_triton(x) and fits_triton(x, prologue, epilogue, weight, bias):
        return _on_triton(x, weight, bias, prologue or Prologue(), epilogue or Epilogue(), reduction)
    if reduction == "none" and _owes_at_most_a_gate(prologue) and (epilogue is None or epilogue.statistics is None):
        gate = None if prologue is None else prologue.gate
        operands = [t for t in (weight, bias, gate, *(epilogue or ())) if isinstance(t, Tensor)]
        # Operands of another dtype than the map's are the reference's.
        if all(t.dtype == x.dtype for t in operands) and dispatch.runs_natively(x, any_requires_grad(x, *operands)):
            x = x.contiguous(memory_format=torch.channels_last)
            return cpu.pointwise_conv(x, weight, bias, gate, epilogue or Epilogue()), None
    return reference.pointwise_conv(x, weight, bias, prologue, epilogue, reduction)


def _on_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, prologue: Prologue, epilogue: Epilogue, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    from effnet_kernels.ops.triton_functions import PointwiseConv
    from effnet_kernels.triton import batch_norm, pointwise, squeeze_excite

    x = x.contiguous(memory_format=torch.channels_last)
    if any_requires_grad(x, weight, bias, *prologue):
        scale, shift, act, gate, _ = prologue
        return PointwiseConv.apply(x, weight, bias, scale, shift, gate, act, reduction)
    if epilogue.residual is not None:
        epilogue = epilogue._replace(residual=epilogue.residual.contiguous(memory_format=torch.channels_last))
    y, partials = pointwise.pointwise_conv(x, weight, bias, prologue, epilogue, reduction)
    if reduction == "pool":
        assert partials is not None
        return squeeze_excite.mean_of_sums(partials, x.shape[2] * x.shape[3]), None
    assert y is not None
    return y, None if partials is None else batch_norm.merge_statistics(partials)


def _owes_at_most_a_gate(prologue: Prologue | None) -> bool:
    return prologue is None or (prologue.scale is None and prologue.shift is None and prologue.act == "none")
