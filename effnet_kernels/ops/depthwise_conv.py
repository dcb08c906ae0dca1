"""The depthwise convolution, with a prologue and an epilogue."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import has_depthwise
from effnet_kernels.backends.operands import as_contiguous, as_map
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion.geometry import output_map, resolve_padding
from effnet_kernels.fusion.spec import REDUCTIONS, Epilogue, Padding, Prologue, Reduction
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
from effnet_kernels.ops.functions import DepthwiseConv


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int | Padding | str = 0,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    reduction: Reduction = "none",
) -> tuple[Tensor, Tensor | None]:
    """k x k depthwise convolution, with a prologue and an epilogue.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; channels-last is fastest.
        weight: [C, 1, k, k], k odd.
        stride: at least 1, of rows and columns alike.
        padding: an integer, (left, right, top, bottom), or ``"same"`` (TensorFlow's); zeros after the prologue.
        prologue: applied to ``x`` on load.
        epilogue: applied to the output before it is stored.
        reduction: ``"statistics"`` returns the [3, C] count, mean and M2 of the stored output beside it; ``"pool"``
            its spatial mean [N, C] (the squeeze, at no pass of its own).

    Returns:
        ``(y [N, C, H', W'], None)``, ``(y, stats [3, C])`` or ``(y, pooled [N, C])``.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit.

    Source: Howard et al. 2017 (MobileNets), section 3.1.
    """
    check_map(x)
    check_choice(reduction, REDUCTIONS, "reduction")
    check_tensor(weight, "weight", "[C, 1, k, k]")
    kernel = weight.shape[-1]
    if kernel % 2 == 0:
        raise ValueError(f"weight: expected an odd kernel size, got {kernel}")
    check_shape(weight, (x.shape[1], 1, kernel, kernel), "weight", x)
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: expected an integer >= 1, got {stride!r}")
    samples, channels, height, width = x.shape
    pads = resolve_padding(padding, (height, width), kernel, stride)
    rows, columns = output_map(height, width, kernel, stride, pads)
    check_prologue(prologue, x)
    check_epilogue(epilogue, x, (samples, channels, rows, columns))
    fits = fits_kernels(x, prologue, epilogue, weight)
    prologue, epilogue = prologue or Prologue(), epilogue or Epilogue()
    fits = fits and prologue.gate is None and epilogue.residual is None
    fits = fits and fits_reduction(reduction, x, None, weight, *prologue)
    backend = select.operator_backend(x) if fits else "reference"
    if not has_depthwise(backend, kernel, stride):
        backend = "reference"
    primitives = primitives_of(backend)
    if backend != "reference":
        x, weight = as_map(x), as_contiguous(weight)
        prologue, epilogue = contiguous(prologue), contiguous(epilogue)
        if any_requires_grad(x, weight, *prologue):
            return DepthwiseConv.apply(primitives, x, weight, *prologue[:3], stride, pads, reduction)
    y, partials = primitives.depthwise_conv(x, weight, stride, pads, prologue, epilogue, reduction)
    if partials is None:
        return y, None
    if reduction == "pool":
        return y, primitives.mean_of_sums(partials, y.shape[2] * y.shape[3])
    return y, primitives.merge_statistics(partials)
