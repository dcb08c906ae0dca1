"""The kernels of :mod:`effnet_kernels.triton.squeeze_excite`."""

import triton
import triton.language as tl

from effnet_kernels.triton.kernels.activation import (
    activate,
    activate_and_differentiate,
    gate_of,
    gate_slope,
    load_affine,
)
from effnet_kernels.triton.kernels.tiles import load_row, load_vector


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def squeeze_kernel(
    x_ptr,
    factor_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    sums_ptr,
    rows,
    c_quotient,
    eps,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = c_quotient * C_DIVISOR
    sample = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    scale, shift = load_affine(scale_ptr, shift_ptr, mean_ptr, var_ptr, eps, channels, inside)
    total = tl.zeros([BLOCK_C], tl.float32)
    base = sample.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)
        mask = (start + row < rows)[:, None] & inside[None, :]  # [BLOCK_M, BLOCK_C]
        offsets = (base + start) * C + (row[:, None] * C + channels[None, :])
        u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        u = activate(u * scale[None, :] + shift[None, :], ACT)
        if factor_ptr is not None:
            u *= tl.load(factor_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(mask, u, 0.0), axis=0)
    total *= load_row(gate_ptr, sample, C, channels, inside, 1.0)
    tl.store(
        sums_ptr + (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C + channels, total, mask=inside
    )


@triton.jit(do_not_specialize=["T", "C"])
def mean_of_sums_kernel(sums_ptr, mean_ptr, T, C, reciprocal_count, BLOCK_C: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    total = merged_sum(sums_ptr + sample * T * C, T, C, channels, inside)
    tl.store(mean_ptr + sample * C + channels, total * reciprocal_count, mask=inside)


@triton.jit
def merged_sum(ptr, T, stride, channels, inside):
    """The sum over T partials, ``stride`` elements apart, in order."""
    total = tl.zeros(channels.shape, tl.float32)
    for t in range(T):
        total += tl.load(ptr + t * stride + channels, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["T", "C", "S"])
def excite_kernel(
    sums_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    gate_ptr,
    pooled_ptr,
    hidden_ptr,
    T,
    C,
    S,
    reciprocal_count,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    # The programs of a sample share its gate; each computes the hidden layer, and the first stores it.
    split, splits = tl.program_id(1), tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)
    hidden = load_vector(b1_ptr, s, s < S, 0.0)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        inside = channels < C
        pooled = merged_sum(sums_ptr + sample * T * C, T, C, channels, inside) * reciprocal_count
        weight_mask = (s < S)[:, None] & inside[None, :]  # [BLOCK_S, BLOCK_C]
        w1 = tl.load(w1_ptr + s[:, None] * C + channels[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        hidden += tl.sum(w1 * pooled[None, :], axis=1)
        tl.store(pooled_ptr + sample * C + channels, pooled, mask=inside & (split == 0))
    tl.store(hidden_ptr + sample * S + s, hidden, mask=(s < S) & (split == 0))
    active = activate(hidden, ACT)
    for start in range(split * BLOCK_C, C, splits * BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        inside = channels < C
        weight_mask = inside[:, None] & (s < S)[None, :]  # [BLOCK_C, BLOCK_S]
        w2 = tl.load(w2_ptr + channels[:, None] * S + s[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        logits = load_vector(b2_ptr, channels, inside, 0.0) + tl.sum(w2 * active[None, :], axis=1)
        tl.store(gate_ptr + sample * C + channels, gate_of(logits, GATE), mask=inside)


@triton.jit(do_not_specialize=["T", "C", "S"])
def excite_backward_kernel(
    sums_ptr,
    gate_ptr,
    hidden_ptr,
    w1_ptr,
    w2_ptr,
    offset_ptr,
    logits_ptr,
    dhidden_ptr,
    norm_sums_ptr,
    T,
    C,
    S,
    reciprocal_count,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)
    sums_ptr += sample * T * KINDS * C
    active = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        inside = channels < C
        gate = tl.load(gate_ptr + sample * C + channels, mask=inside, other=0.0)
        logits = merged_sum(sums_ptr, T, KINDS * C, channels, inside) * gate_slope(gate, GATE)
        tl.store(logits_ptr + sample * C + channels, logits, mask=inside & (split == 0))
        weight_mask = inside[:, None] & (s < S)[None, :]  # [BLOCK_C, BLOCK_S]
        w2 = tl.load(w2_ptr + channels[:, None] * S + s[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        active += tl.sum(w2 * logits[:, None], axis=0)
    hidden = tl.load(hidden_ptr + sample * S + s, mask=s < S, other=0.0)
    _, derivative = activate_and_differentiate(hidden, ACT)
    dhidden = active * derivative
    tl.store(dhidden_ptr + sample * S + s, dhidden, mask=(s < S) & (split == 0))
    for start in range(split * BLOCK_C, C, splits * BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        inside = channels < C
        weight_mask = (s < S)[:, None] & inside[None, :]  # [BLOCK_S, BLOCK_C]
        w1 = tl.load(w1_ptr + s[:, None] * C + channels[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        offset = tl.sum(w1 * dhidden[:, None], axis=0) * reciprocal_count
        tl.store(offset_ptr + sample * C + channels, offset, mask=inside)
        if KINDS == 5:
            gate = tl.load(gate_ptr + sample * C + channels, mask=inside, other=0.0)
            t2 = merged_sum(sums_ptr + C, T, KINDS * C, channels, inside)
            t3 = merged_sum(sums_ptr + 2 * C, T, KINDS * C, channels, inside)
            t4 = merged_sum(sums_ptr + 3 * C, T, KINDS * C, channels, inside)
            t5 = merged_sum(sums_ptr + 4 * C, T, KINDS * C, channels, inside)
            out = norm_sums_ptr + sample * 2 * C + channels
            tl.store(out, gate * t2 + offset * t3, mask=inside)
            tl.store(out + C, gate * t4 + offset * t5, mask=inside)


@triton.jit(do_not_specialize=["N", "C", "S"])
def excite_backward_weight_kernel(
    logits_ptr,
    dhidden_ptr,
    hidden_ptr,
    pooled_ptr,
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
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    squeezed = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    dw1 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    dw2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    db1 = tl.zeros([BLOCK_S], tl.float32)
    db2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        c_mask = (n < N)[:, None] & (channels < C)[None, :]  # [BLOCK_N, BLOCK_C]
        s_mask = (n < N)[:, None] & (squeezed < S)[None, :]  # [BLOCK_N, BLOCK_S]
        c_offsets = n[:, None] * C + channels[None, :]
        s_offsets = n[:, None] * S + squeezed[None, :]
        logits = tl.load(logits_ptr + c_offsets, mask=c_mask, other=0.0)
        pooled = tl.load(pooled_ptr + c_offsets, mask=c_mask, other=0.0)
        dhidden = tl.load(dhidden_ptr + s_offsets, mask=s_mask, other=0.0)
        active = activate(tl.load(hidden_ptr + s_offsets, mask=s_mask, other=0.0), ACT)
        dw1 += tl.dot(tl.trans(dhidden), pooled, input_precision="ieee")
        dw2 += tl.dot(tl.trans(logits), active, input_precision="ieee")
        db1 += tl.sum(dhidden, axis=0)
        db2 += tl.sum(logits, axis=0)
    inside_c, inside_s = channels < C, squeezed < S
    tl.store(dw1_ptr + squeezed[:, None] * C + channels[None, :], dw1, mask=inside_s[:, None] & inside_c[None, :])
    tl.store(dw2_ptr + channels[:, None] * S + squeezed[None, :], dw2, mask=inside_c[:, None] & inside_s[None, :])
    tl.store(db1_ptr + squeezed, db1, mask=inside_s & (tl.program_id(0) == 0))
    tl.store(db2_ptr + channels, db2, mask=inside_c & (tl.program_id(1) == 0))
