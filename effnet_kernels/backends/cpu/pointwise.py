"""Pointwise (1x1) convolution with a prologue on the CPU, forward and backward."""

from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    ACTIVATION_INDEX,
    address,
    empty,
    empty_map,
    execution,
    folded,
    gradient_addresses,
    map_address,
    prologue_addresses,
    with_both,
    written,
)
from effnet_kernels.fusion.spec import REDUCTIONS, SUMS_OF_GRADIENT, Epilogue, OutputGradient, Prologue, Reduction


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, prologue: Prologue, epilogue: Epilogue, reduction: Reduction
) -> tuple[Tensor | None, Tensor | None]:
    """x [N, C, H, W], weight [K, C, 1, 1], bias [K] to ``(y [N, K, H, W], None)``.

    With "statistics" the second is partial (count, mean, M2) of the stored values, [P, 3, K]; with "pool" the map is
    not stored, and the second is partial sums of the finished values over each image's pixels, [N, T, K]. Neither goes
    with a residual.
    """
    samples, channels, height, width = x.shape
    outputs = weight.shape[0]
    pools = reduction == "pool"
    if reduction != "none" and epilogue.residual is not None:
        raise ValueError(f"reduction: expected 'none' beside a residual, got {reduction!r}")
    scale, shift, act, _, _ = folded(Prologue(epilogue.scale, epilogue.shift, epilogue.act, None, epilogue.statistics))
    # The names hold the tensors that are made here until the call returns: it takes addresses alone.
    prologue = folded(prologue)
    partition = extension().partition_pixels(samples, height * width, pools or prologue.gate is not None)
    parts = partition[2] * partition[3]
    y = None if pools else empty_map(samples, outputs, height, width)
    partials = None
    if reduction == "statistics":
        partials = empty(parts, 3, outputs)
    elif pools:
        partials = empty(samples, partition[3], outputs)
    extension().pointwise_forward(
        partition,
        channels,
        outputs,
        map_address("x", x, samples, channels, height, width),
        address("weight", weight, outputs, channels, 1, 1),
        address("bias", bias, outputs),
        prologue_addresses(prologue, samples, channels),
        (
            address("scale", scale, outputs),
            address("shift", shift, outputs),
            map_address("residual", epilogue.residual, samples, outputs, height, width),
            ACTIVATION_INDEX[act],
        ),
        REDUCTIONS.index(reduction),
        written(y),
        written(partials),
        *execution(),
    )
    return y, partials


def pointwise_conv_backward(
    gradient: OutputGradient,
    weight: Tensor,
    x: Tensor,
    prologue: Prologue,
    mean: Tensor | None,
    residual: Tensor | None,
    apply_act_grad: bool,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input behind the prologue, [N, C, H, W], plus ``residual``, and of the weight, [K, C, 1, 1].

    With ``mean``, of the raw input ``x`` whose activation ``prologue`` describes (u the activated value, u' its
    derivative, dq the gradient of the gated u), the second result is partial :class:`PixelSums` of each image in one
    tensor, [N, T, 5, C]. Returned is dq, or with ``apply_act_grad`` gate * dq * u', and the sums without the slopes,
    [N, T, 3, C]. The output's gradient is formed once for both products.
    """
    samples, channels, height, width = x.shape
    outputs = weight.shape[0]
    sums_needed = needs_input and mean is not None
    by_image = sums_needed or prologue.gate is not None or gradient.by_sample()
    partition = extension().partition_pixels(samples, height * width, by_image)
    dx = empty_map(samples, channels, height, width) if needs_input else None
    sums = empty(samples, partition[3], 5, channels) if sums_needed else None
    dweight = empty(outputs, channels, 1, 1) if needs_weight else None
    prologue, gradient = folded(prologue), with_both(gradient)
    extension().pointwise_backward(
        partition,
        channels,
        outputs,
        gradient_addresses(gradient, samples, outputs, height, width),
        address("weight", weight, outputs, channels, 1, 1),
        map_address("x", x, samples, channels, height, width),
        prologue_addresses(prologue, samples, channels),
        address("mean", mean, channels),
        map_address("residual", residual, samples, channels, height, width),
        apply_act_grad,
        written(dx),
        written(sums),
        written(dweight),
        *execution(),
    )
    return dx, sums[:, :, SUMS_OF_GRADIENT] if sums is not None and apply_act_grad else sums, dweight
