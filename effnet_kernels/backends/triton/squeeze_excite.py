"""Squeeze-and-excitation (Hu et al. 2018, section 3): pooled sums, and the gate as arithmetic on vectors."""

import torch
from torch import Tensor

from effnet_kernels.backends.triton.configs import target_of
from effnet_kernels.backends.triton.configs.elementwise import excitation, excitation_backward, stream
from effnet_kernels.backends.triton.kernels.squeeze_excite import (
    excite_backward_kernel,
    excite_backward_weight_kernel,
    excite_kernel,
    mean_of_sums_kernel,
    squeeze_kernel,
)
from effnet_kernels.backends.triton.launch import channel_divisor, launcher
from effnet_kernels.fusion.spec import Activation, Gate, Prologue

launch_excite = launcher(excite_kernel)
launch_excite_backward = launcher(excite_backward_kernel)
launch_excite_backward_weight = launcher(excite_backward_weight_kernel)
launch_mean_of_sums = launcher(mean_of_sums_kernel)
launch_squeeze = launcher(squeeze_kernel)

# The most partial sums of an image that a squeeze leaves; excite adds them up.
MAX_PARTIALS = 8


def squeeze(x: Tensor, prologue: Prologue, factor: Tensor | None = None) -> Tensor:
    """Partial pooled sums [N, T, C], in fp32, of x [N, C, H, W] after its prologue, times ``factor`` [N, C, H, W]."""
    sums, _ = _squeeze(x, prologue, factor, None)
    return sums


def squeeze_for_backward(x: Tensor, prologue: Prologue, mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`squeeze`, and partial sums [N, T, 2, C], fp32, of the activation's slope u' and of u' * (x - mean).

    One launch.
    """
    return _squeeze(x, prologue, None, mean)


def _squeeze(
    x: Tensor, prologue: Prologue, factor: Tensor | None, centre: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The pooled sums, and with ``centre`` [C] those of the slopes. One launch."""
    samples, channels, height, width = x.shape
    rows = height * width
    config = stream(samples, rows, channels, target_of(x), MAX_PARTIALS)
    sums = torch.empty(samples, config.num_programs, channels, dtype=torch.float32, device=x.device)
    slopes = None
    if centre is not None:
        slopes = torch.empty(samples, config.num_programs, 2, channels, dtype=torch.float32, device=x.device)
    scale, shift, act, gate, statistics = prologue
    divisor = channel_divisor(channels)
    launch_squeeze(
        (config.num_programs, -(-channels // config.block_c), samples),
        x_ptr=x,
        factor_ptr=factor,
        scale_ptr=scale,
        shift_ptr=shift,
        mean_ptr=None if statistics is None else statistics.mean,
        var_ptr=None if statistics is None else statistics.var,
        gate_ptr=gate,
        centre_ptr=centre,
        sums_ptr=sums,
        slopes_ptr=slopes,
        rows=rows,
        c_quotient=channels // divisor,
        eps=0.0 if statistics is None else statistics.eps,
        ACT=act,
        C_DIVISOR=divisor,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        SUM_ROWS=config.sum_rows(x.dtype),
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return sums, slopes


def mean_of_sums(sums: Tensor, count: int) -> Tensor:
    """Partial sums over ``count`` pixels to their mean: [N, T, C] to [N, C] fp32."""
    samples, partials, channels = sums.shape
    mean = torch.empty(samples, channels, dtype=torch.float32, device=sums.device)
    block = 256
    launch_mean_of_sums(
        (samples, -(-channels // block), 1),
        sums_ptr=sums,
        mean_ptr=mean,
        T=partials,
        C=channels,
        reciprocal_count=1.0 / count,
        BLOCK_C=block,
        num_warps=4,
    )
    return mean


def excite(
    sums: Tensor,
    count: int,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation,
    kind: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate [N, C] from partial sums over ``count`` pixels [N, T, C], with w1 [S, C], b1 [S], w2 [C, S] and b2 [C].

    For backward also their mean, the squeeze, [N, C], and the hidden layer [N, S] before its activation; all in fp32.
    """
    samples, partials, channels = sums.shape
    squeezed = w1.shape[0]
    config = excitation(samples, partials, channels, squeezed, target_of(sums))
    mean, gate = (torch.empty(samples, channels, dtype=torch.float32, device=sums.device) for _ in range(2))
    hidden = torch.empty(samples, squeezed, dtype=torch.float32, device=sums.device)
    divisor, squeezed_divisor = channel_divisor(channels), channel_divisor(squeezed, (4, 2))
    launch_excite(
        (samples, config.num_programs, 1),
        sums_ptr=sums,
        w1_ptr=w1,
        b1_ptr=b1,
        w2_ptr=w2,
        b2_ptr=b2,
        gate_ptr=gate,
        mean_ptr=mean,
        hidden_ptr=hidden,
        T=partials,
        c_quotient=channels // divisor,
        s_quotient=squeezed // squeezed_divisor,
        reciprocal_count=1.0 / count,
        ACT=act,
        GATE=kind,
        C_DIVISOR=divisor,
        S_DIVISOR=squeezed_divisor,
        BLOCK_S=config.block_s,
        BLOCK_C=config.block_c,
        BLOCK_T=config.block_t,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return gate, mean, hidden


def excite_backward(
    sums: Tensor,
    count: int,
    gate: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    act: Activation,
    kind: Gate,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The backward of squeeze-and-excitation, on vectors.

    ``sums`` are partial sums over ``count`` pixels: the three of :func:`.pointwise.pointwise_conv_backward_data`,
    [N, T, 3, C], beside which are the ``slopes`` of :func:`squeeze_for_backward`, or ``grad_gate`` alone, [N, T, 1, C].
    Returns

    - offset [N, C], the gradient that each pixel's activation gets through the mean;
    - the gradients of the gate's logits [N, C] and of the hidden layer [N, S];
    - with slopes the sums for the backward of the BatchNorm before, [N, 2, C]: gate * grad_shift + offset * slope and
      gate * grad_scale + offset * centred_slope.
    """
    samples, partials, num_sums, channels = sums.shape
    squeezed = w1.shape[0]
    config = excitation_backward(samples, channels, squeezed, target_of(sums))
    offset, grad_logits = (torch.empty(samples, channels, dtype=torch.float32, device=sums.device) for _ in range(2))
    grad_hidden = torch.empty(samples, squeezed, dtype=torch.float32, device=sums.device)
    norm_sums = None
    if slopes is not None:
        norm_sums = torch.empty(samples, 2, channels, dtype=torch.float32, device=sums.device)
    # By 2 alone: wider accesses would give the channels to few threads, which compute on each of them here.
    divisor, squeezed_divisor = channel_divisor(channels, (2,)), channel_divisor(squeezed, (4, 2))
    launch_excite_backward(
        (samples, config.num_programs, 1),
        sums_ptr=sums,
        gate_ptr=gate,
        hidden_ptr=hidden,
        w1_ptr=w1,
        w2_ptr=w2,
        offset_ptr=offset,
        grad_logits_ptr=grad_logits,
        grad_hidden_ptr=grad_hidden,
        slopes_ptr=slopes,
        norm_sums_ptr=norm_sums,
        T=partials,
        slopes_T=0 if slopes is None else slopes.shape[1],
        c_quotient=channels // divisor,
        s_quotient=squeezed // squeezed_divisor,
        reciprocal_count=1.0 / count,
        ACT=act,
        GATE=kind,
        NUM_SUMS=num_sums,
        C_DIVISOR=divisor,
        S_DIVISOR=squeezed_divisor,
        BLOCK_S=config.block_s,
        BLOCK_C=config.block_c,
        BLOCK_T=config.block_t,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return offset, grad_logits, grad_hidden, norm_sums


def excite_backward_weight(
    grad_logits: Tensor, grad_hidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of w1 [S, C], b1 [S], w2 [C, S] and b2 [C], in fp32.

    ``grad_logits`` [N, C] and ``grad_hidden`` [N, S] are the gradients of :func:`excite_backward`; ``hidden`` [N, S]
    and ``pooled`` [N, C], the mean, are results of :func:`excite`.
    """
    samples, channels = grad_logits.shape
    squeezed = hidden.shape[1]
    device = grad_logits.device
    dw1 = torch.empty(squeezed, channels, dtype=torch.float32, device=device)
    db1 = torch.empty(squeezed, dtype=torch.float32, device=device)
    dw2 = torch.empty(channels, squeezed, dtype=torch.float32, device=device)
    db2 = torch.empty(channels, dtype=torch.float32, device=device)
    block_c, block_s = 32, 32
    launch_excite_backward_weight(
        (-(-channels // block_c), -(-squeezed // block_s), 1),
        grad_logits_ptr=grad_logits,
        grad_hidden_ptr=grad_hidden,
        hidden_ptr=hidden,
        mean_ptr=pooled,
        dw1_ptr=dw1,
        db1_ptr=db1,
        dw2_ptr=dw2,
        db2_ptr=db2,
        N=samples,
        C=channels,
        S=squeezed,
        ACT=act,
        BLOCK_N=16,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return dw1, db1, dw2, db2
