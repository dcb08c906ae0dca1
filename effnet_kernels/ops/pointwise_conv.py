"""The 1x1 convolution, with a prologue and an epilogue."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.spec import REDUCTIONS, Epilogue, Prologue, Reduction
from effnet_kernels.ops.checks import (
    any_requires_grad,
    check_choice,
    check_epilogue,
    check_map,
    check_prologue,
    check_shape,
    check_tensor,
    contiguous,
    fits_kernels,
    fits_reduction,
)
from effnet_kernels.ops.functions import PointwiseConv


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """1x1 convolution, with a prologue and an epilogue (the expand and project convolutions of MBConv).

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; channels-last is fastest.
        weight: [K, C, 1, 1].
        bias: [K].
        prologue: applied to ``x`` on load.
        epilogue: applied to the output before it is stored.
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
    fits = fits_kernels(x, prologue, epilogue, weight, bias)
    prologue, epilogue = prologue or Prologue(), epilogue or Epilogue()
    fits = fits and fits_reduction(reduction, x, epilogue.residual, weight, bias, *prologue)
    backend = select.operator_backend(x) if fits else "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        x, weight, bias = as_map(x), as_contiguous(weight), None if bias is None else as_contiguous(bias)
        prologue, epilogue = contiguous(prologue), contiguous(epilogue)
        if any_requires_grad(x, weight, bias, *prologue):
            scale, shift, act, gate, _ = prologue
            return PointwiseConv.apply(primitives, x, weight, bias, scale, shift, gate, act, reduction)
    y, partials = primitives.pointwise_conv(x, weight, bias, prologue, epilogue, reduction)
    if reduction == "pool":
        assert partials is not None
        return primitives.mean_of_sums(partials, x.shape[2] * x.shape[3]), None
    assert y is not None
    return y, None if partials is None else primitives.merge_statistics(partials)
