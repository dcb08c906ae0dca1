"""The kernels of :mod:`effnet_kernels.backends.triton.squeeze_excite`.

N samples, C channels, S squeezed channels. Pooled sums over an image's pixels come as T partial sums.
"""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import (
    activate,
    activate_and_differentiate,
    gate_derivative,
    gate_of,
)
from effnet_kernels.backends.triton.kernels.tiles import load_affine, load_row, load_vector, sum_within_threads


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def squeeze_kernel(
    x_ptr,
    factor_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    centre_ptr,
    sums_ptr,
    slopes_ptr,
    rows,
    c_quotient,
    eps,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """sums [N, T, C]: pooled sums of act(scale * x + shift) * gate * factor; T is the grid's first dimension.

    slopes [N, T, 2, C] or None: of the slope act'(scale * x + shift), and of it times x - centre.

    Maps: x and factor [N, rows, C]; factor may be None.
    Vectors: scale, shift, mean and var [C], see :func:`load_affine`; gate [N, C], centre [C].
    """
    C = c_quotient * C_DIVISOR
    sample = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    scale, shift = load_affine(scale_ptr, shift_ptr, mean_ptr, var_ptr, eps, channels, inside)
    centre = load_vector(centre_ptr, channels, inside, 0.0)  # [BLOCK_C]
    total = tl.zeros([SUM_ROWS, BLOCK_C], tl.float32)
    slope = tl.zeros([SUM_ROWS, BLOCK_C], tl.float32)
    centred_slope = tl.zeros([SUM_ROWS, BLOCK_C], tl.float32)
    base = sample.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_inside = (start + row < rows)[:, None]  # [BLOCK_M, 1]
        mask = row_inside & inside[None, :]  # [BLOCK_M, BLOCK_C]
        offsets = (base + start) * C + (row[:, None] * C + channels[None, :])  # [BLOCK_M, BLOCK_C]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        z = x * scale[None, :] + shift[None, :]
        if slopes_ptr is not None:
            u, derivative = activate_and_differentiate(z, ACT)
            derivative = tl.where(row_inside, derivative, 0.0)
            slope += sum_within_threads(derivative, SUM_ROWS)
            centred_slope += sum_within_threads(derivative * (x - centre[None, :]), SUM_ROWS)
        else:
            u = activate(z, ACT)
        if factor_ptr is not None:
            u *= tl.load(factor_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total += sum_within_threads(tl.where(row_inside, u, 0.0), SUM_ROWS)
    sums = tl.sum(total, axis=0) * load_row(gate_ptr, sample, C, channels, inside, 1.0)  # [BLOCK_C]
    partial = sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + partial * C + channels, sums, mask=inside)
    if slopes_ptr is not None:
        out = slopes_ptr + partial * 2 * C + channels  # [BLOCK_C]
        tl.store(out, tl.sum(slope, axis=0), mask=inside)
        tl.store(out + C, tl.sum(centred_slope, axis=0), mask=inside)


@triton.jit(do_not_specialize=["T", "C"])
def mean_of_sums_kernel(sums_ptr, mean_ptr, T, C, reciprocal_count, BLOCK_C: tl.constexpr):
    """mean [N, C], from pooled sums [N, T, C] over 1 / ``reciprocal_count`` pixels."""
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    total = sum_of_partials(sums_ptr + sample * T * C, T, C, channels, inside, 8)
    tl.store(mean_ptr + sample * C + channels, total * reciprocal_count, mask=inside)


@triton.jit
def sum_of_partials(ptr, T, stride, channels, inside, BLOCK_T: tl.constexpr):
    """The sum [BLOCK_C] of T partial sums that are ``stride`` elements apart, in the same order at every call.

    BLOCK_T of them are loaded at once; one after the other, each load would wait for the one before.
    """
    total = tl.zeros(channels.shape, tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        at = ptr + t[:, None] * stride + channels[None, :]  # [BLOCK_T, BLOCK_C]
        total += tl.sum(tl.load(at, mask=(t < T)[:, None] & inside[None, :], other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["T", "c_quotient", "s_quotient"])
def excite_kernel(
    sums_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    gate_ptr,
    mean_ptr,
    hidden_ptr,
    T,
    c_quotient,
    s_quotient,
    reciprocal_count,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    S_DIVISOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """gate = GATE(w2 act(hidden) + b2), with hidden = w1 mean + b1 and mean the squeeze, from pooled sums.

    sums [N, T, C], w1 [S, C], b1 [S] or None, w2 [C, S], b2 [C] or None.

    Stores gate and mean [N, C], and hidden [N, S] before its activation.
    """
    C = c_quotient * C_DIVISOR
    S = s_quotient * S_DIVISOR
    sample = tl.program_id(0).to(tl.int64)
    # The programs of a sample share the channels of its gate. Each computes the hidden layer, and the first stores it.
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    products = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = channels < C
        sums = sum_of_partials(sums_ptr + sample * T * C, T, C, channels, inside, BLOCK_T)
        mean = sums * reciprocal_count  # [BLOCK_C]
        weight_mask = (s < S)[:, None] & inside[None, :]  # [BLOCK_S, BLOCK_C]
        w1 = tl.load(w1_ptr + s[:, None] * C + channels[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        products += w1 * mean[None, :]
        tl.store(mean_ptr + sample * C + channels, mean, mask=inside & (program == 0))
    hidden = load_vector(b1_ptr, s, s < S, 0.0) + tl.sum(products, axis=1)  # [BLOCK_S]
    tl.store(hidden_ptr + sample * S + s, hidden, mask=(s < S) & (program == 0))
    active = activate(hidden, ACT)  # [BLOCK_S]
    for start in range(program * BLOCK_C, C, num_programs * BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = channels < C
        weight_mask = inside[:, None] & (s < S)[None, :]  # [BLOCK_C, BLOCK_S]
        w2 = tl.load(w2_ptr + channels[:, None] * S + s[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        logits = load_vector(b2_ptr, channels, inside, 0.0) + tl.sum(w2 * active[None, :], axis=1)  # [BLOCK_C]
        tl.store(gate_ptr + sample * C + channels, gate_of(logits, GATE), mask=inside)


@triton.jit(do_not_specialize=["T", "slopes_T", "c_quotient", "s_quotient"])
def excite_backward_kernel(
    sums_ptr,
    gate_ptr,
    hidden_ptr,
    w1_ptr,
    w2_ptr,
    offset_ptr,
    grad_logits_ptr,
    grad_hidden_ptr,
    slopes_ptr,
    norm_sums_ptr,
    T,
    slopes_T,
    c_quotient,
    s_quotient,
    reciprocal_count,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    S_DIVISOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The gradients of the logits, of the hidden layer and of the mean, and the sums for the BatchNorm before.

    sums [N, T, NUM_SUMS, C]: grad_gate, or with NUM_SUMS of 3 also grad_shift and grad_scale, see
        :func:`~effnet_kernels.backends.triton.kernels.pointwise.pointwise_conv_backward_data_kernel`.
    slopes [N, slopes_T, 2, C]: slope and centred_slope, see :func:`squeeze_kernel`, or None.
    gate [N, C], hidden [N, S], w1 [S, C], w2 [C, S].

    Stores grad_logits [N, C], grad_hidden [N, S] and offset [N, C], the gradient of each pixel that comes through the
    mean. With slopes also norm_sums [N, 2, C], the sums of dz and of dz * (x - mean). They follow from the other sums,
    because gate and offset are constant over the pixels of dz = (gate * dq + offset) * u'.
    """
    C = c_quotient * C_DIVISOR
    S = s_quotient * S_DIVISOR
    sample = tl.program_id(0).to(tl.int64)
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    sums_ptr += sample * T * NUM_SUMS * C
    products = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = channels < C
        gate = tl.load(gate_ptr + sample * C + channels, mask=inside, other=0.0)  # [BLOCK_C]
        grad_gate = sum_of_partials(sums_ptr, T, NUM_SUMS * C, channels, inside, BLOCK_T)  # [BLOCK_C]
        grad_logits = grad_gate * gate_derivative(gate, GATE)  # [BLOCK_C]
        tl.store(grad_logits_ptr + sample * C + channels, grad_logits, mask=inside & (program == 0))
        weight_mask = inside[:, None] & (s < S)[None, :]  # [BLOCK_C, BLOCK_S]
        w2 = tl.load(w2_ptr + channels[:, None] * S + s[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        products += w2 * grad_logits[:, None]
    hidden = tl.load(hidden_ptr + sample * S + s, mask=s < S, other=0.0)  # [BLOCK_S]
    _, derivative = activate_and_differentiate(hidden, ACT)  # [BLOCK_S]
    grad_hidden = tl.sum(products, axis=0) * derivative  # [BLOCK_S]
    tl.store(grad_hidden_ptr + sample * S + s, grad_hidden, mask=(s < S) & (program == 0))
    for start in range(program * BLOCK_C, C, num_programs * BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = channels < C
        weight_mask = (s < S)[:, None] & inside[None, :]  # [BLOCK_S, BLOCK_C]
        w1 = tl.load(w1_ptr + s[:, None] * C + channels[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        offset = tl.sum(w1 * grad_hidden[:, None], axis=0) * reciprocal_count  # [BLOCK_C]
        tl.store(offset_ptr + sample * C + channels, offset, mask=inside)
        if slopes_ptr is not None:
            gate = tl.load(gate_ptr + sample * C + channels, mask=inside, other=0.0)  # [BLOCK_C]
            grad_shift = sum_of_partials(sums_ptr + C, T, NUM_SUMS * C, channels, inside, BLOCK_T)
            grad_scale = sum_of_partials(sums_ptr + 2 * C, T, NUM_SUMS * C, channels, inside, BLOCK_T)
            own_slopes_ptr = slopes_ptr + sample * slopes_T * 2 * C
            slope = sum_of_partials(own_slopes_ptr, slopes_T, 2 * C, channels, inside, BLOCK_T)
            centred_slope = sum_of_partials(own_slopes_ptr + C, slopes_T, 2 * C, channels, inside, BLOCK_T)
            out = norm_sums_ptr + sample * 2 * C + channels
            tl.store(out, gate * grad_shift + offset * slope, mask=inside)
            tl.store(out + C, gate * grad_scale + offset * centred_slope, mask=inside)


@triton.jit(do_not_specialize=["N", "C", "S"])
def excite_backward_weight_kernel(
    grad_logits_ptr,
    grad_hidden_ptr,
    hidden_ptr,
    mean_ptr,
    dw1_ptr,
    db1_ptr,
    dw2_ptr,
    db2_ptr,
    N,
    C,
    S,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of the weights and biases: dw1 [S, C], db1 [S], dw2 [C, S] and db2 [C].

    grad_logits and mean [N, C], grad_hidden and hidden [N, S].
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    squeezed = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    dw1 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    dw2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    db1 = tl.zeros([BLOCK_S], tl.float32)
    db2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        c_mask = (n < N)[:, None] & (channels < C)[None, :]  # [BLOCK_N, BLOCK_C]
        s_mask = (n < N)[:, None] & (squeezed < S)[None, :]  # [BLOCK_N, BLOCK_S]
        c_offsets = n[:, None] * C + channels[None, :]  # [BLOCK_N, BLOCK_C]
        s_offsets = n[:, None] * S + squeezed[None, :]  # [BLOCK_N, BLOCK_S]
        grad_logits = tl.load(grad_logits_ptr + c_offsets, mask=c_mask, other=0.0)  # [BLOCK_N, BLOCK_C]
        mean = tl.load(mean_ptr + c_offsets, mask=c_mask, other=0.0)  # [BLOCK_N, BLOCK_C]
        grad_hidden = tl.load(grad_hidden_ptr + s_offsets, mask=s_mask, other=0.0)  # [BLOCK_N, BLOCK_S]
        active = activate(tl.load(hidden_ptr + s_offsets, mask=s_mask, other=0.0), ACT)  # [BLOCK_N, BLOCK_S]
        dw1 += tl.dot(tl.trans(grad_hidden), mean, input_precision="ieee")
        dw2 += tl.dot(tl.trans(grad_logits), active, input_precision="ieee")
        db1 += tl.sum(grad_hidden, axis=0)
        db2 += tl.sum(grad_logits, axis=0)
    inside_c, inside_s = channels < C, squeezed < S
    tl.store(dw1_ptr + squeezed[:, None] * C + channels[None, :], dw1, mask=inside_s[:, None] & inside_c[None, :])
    tl.store(dw2_ptr + channels[:, None] * S + squeezed[None, :], dw2, mask=inside_c[:, None] & inside_s[None, :])
    tl.store(db1_ptr + squeezed, db1, mask=inside_s & (tl.program_id(0) == 0))
    tl.store(db2_ptr + channels, db2, mask=inside_c & (tl.program_id(1) == 0))
