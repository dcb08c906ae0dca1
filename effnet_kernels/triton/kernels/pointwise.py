"""Kernels of the pointwise convolution: GEMMs over rows of channels, with everything between them on load and store.

Rows are pixels in NHWC order. They come in groups (samples, where something depends on the sample, else all as one), so
that a tile never crosses a sample and a gate is a vector for it.
"""

import triton
import triton.language as tl

from effnet_kernels.triton.kernels.activation import activate, activate_and_differentiate, load_affine, merge_moments
from effnet_kernels.triton.kernels.tiles import gradient_of_norm, load_row, load_vector


@triton.jit(do_not_specialize=["rows", "groups", "in_quotient", "out_quotient"])
def pointwise_conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    out_scale_ptr,
    out_shift_ptr,
    out_mean_ptr,
    out_var_ptr,
    residual_ptr,
    y_ptr,
    partials_ptr,
    rows,
    groups,
    in_quotient,
    out_quotient,
    eps,
    ACT: tl.constexpr,
    OUT_ACT: tl.constexpr,
    REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, n] = sum over k of act(scale * x + shift)[m, k] * gate[k] * weight[n, k], and its epilogue."""
    K = in_quotient * IN_DIVISOR
    N = out_quotient * OUT_DIVISOR
    owner = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < N
    m = tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(rows, BLOCK_M)
    bias = load_vector(bias_ptr, n, n_inside, 0.0)
    out_scale, out_shift = load_affine(out_scale_ptr, out_shift_ptr, out_mean_ptr, out_var_ptr, eps, n, n_inside)
    count = 0.0
    mean = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), groups * tiles, tl.num_programs(1)):
        group = owner * groups + tile // tiles
        start = (tile % tiles) * BLOCK_M
        m_inside = start + m < rows
        row = group.to(tl.int64) * rows + start
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k_start in range(0, K, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            k_inside = k < K
            a = tl.load(
                x_ptr + row * K + (m[:, None] * K + k[None, :]), mask=m_inside[:, None] & k_inside[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            if scale_ptr is not None or shift_ptr is not None or gate_ptr is not None or ACT != "none":
                scale = load_vector(scale_ptr, k, k_inside, 1.0)
                shift = load_vector(shift_ptr, k, k_inside, 0.0)
                gate = load_row(gate_ptr, group, K, k, k_inside, 1.0)
                # Rows past the end yield values that are never stored, columns past the end meet weights of zero.
                a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT) * gate[None, :]
            weight = tl.load(
                weight_ptr + n[:, None] * K + k[None, :], mask=n_inside[:, None] & k_inside[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_K]
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            acc = tl.dot(a.to(dtype), tl.trans(weight.to(dtype)), acc, input_precision=PRECISION)
        y = activate((acc + bias[None, :]) * out_scale[None, :] + out_shift[None, :], OUT_ACT)
        mask = m_inside[:, None] & n_inside[None, :]  # [BLOCK_M, BLOCK_N]
        offsets = row * N + (m[:, None] * N + n[None, :])
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            stored = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offsets, stored, mask=mask)
            y = stored.to(tl.float32)
        if REDUCTION == "statistics":
            tile_count = tl.minimum(rows - start, BLOCK_M).to(tl.float32)
            tile_mean = tl.sum(tl.where(mask, y, 0.0), axis=0) / tile_count
            deviation = tl.where(mask, y - tile_mean[None, :], 0.0)
            tile_m2 = tl.sum(deviation * deviation, axis=0)
            count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)
        elif REDUCTION == "pool":
            mean += tl.sum(tl.where(mask, y, 0.0), axis=0)
    partial = owner.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if REDUCTION == "statistics":
        out = partials_ptr + partial * 3 * N + n
        tl.store(out, tl.zeros([BLOCK_N], tl.float32) + count, mask=n_inside)
        tl.store(out + N, mean, mask=n_inside)
        tl.store(out + 2 * N, m2, mask=n_inside)
    elif REDUCTION == "pool":
        tl.store(partials_ptr + partial * N + n, mean, mask=n_inside)


@triton.jit
def output_gradient(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    gate_ptr,
    keep_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    group,
    K,
    k,
    k_inside,
    offsets,
    mask,
    ACT: tl.constexpr,
):
    """dy of :class:`effnet_kernels.deferred.OutputGradient` on a tile of rows by channels k; zero outside of it."""
    y = tl.zeros(offsets.shape, tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = load_row(gate_ptr, group, K, k, k_inside, 1.0)
    offset = load_row(offset_ptr, group, K, k, k_inside, 0.0)
    keep = 1.0
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + group).to(tl.float32)
    scale = load_vector(scale_ptr, k, k_inside, 1.0)
    shift = load_vector(shift_ptr, k, k_inside, 0.0)
    dy = gradient_of_norm(grad_ptr, y, offsets, mask, gate, keep, offset, scale, shift, ACT)
    if coefficients_ptr is not None:
        alpha = load_vector(coefficients_ptr, k, k_inside, 0.0)
        beta = load_vector(coefficients_ptr + K, k, k_inside, 0.0)
        gamma = load_vector(coefficients_ptr + 2 * K, k, k_inside, 0.0)
        dy = alpha[None, :] * dy + (beta[None, :] * y + gamma[None, :])
    return tl.where(mask, dy, 0.0)


@triton.jit(do_not_specialize=["rows", "groups", "in_quotient", "out_quotient"])
def pointwise_conv_backward_data_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    grad_gate_ptr,
    keep_ptr,
    offset_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    weight_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    mean_ptr,
    residual_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    groups,
    in_quotient,
    out_quotient,
    GRAD_ACT: tl.constexpr,
    ACT: tl.constexpr,
    THROUGH: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[m, n] = sum over output channels k of dy[m, k] * weight[k, n]; n are input channels."""
    N = in_quotient * IN_DIVISOR
    K = out_quotient * OUT_DIVISOR
    owner = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < N
    m = tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(rows, BLOCK_M)
    dq_u = tl.zeros([BLOCK_N], tl.float32)
    dq_s = tl.zeros([BLOCK_N], tl.float32)
    s_only = tl.zeros([BLOCK_N], tl.float32)
    dq_s_x = tl.zeros([BLOCK_N], tl.float32)
    s_x = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), groups * tiles, tl.num_programs(1)):
        group = owner * groups + tile // tiles
        start = (tile % tiles) * BLOCK_M
        m_inside = start + m < rows
        row = group.to(tl.int64) * rows + start
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k_start in range(0, K, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            k_inside = k < K
            dy = output_gradient(
                grad_ptr,
                y_ptr,
                coefficients_ptr,
                grad_gate_ptr,
                keep_ptr,
                offset_ptr,
                grad_scale_ptr,
                grad_shift_ptr,
                group,
                K,
                k,
                k_inside,
                row * K + (m[:, None] * K + k[None, :]),
                m_inside[:, None] & k_inside[None, :],
                GRAD_ACT,
            )  # [BLOCK_M, BLOCK_K]
            weight = tl.load(
                weight_ptr + k[:, None] * N + n[None, :], mask=k_inside[:, None] & n_inside[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            dtype: tl.constexpr = dx_ptr.dtype.element_ty
            acc = tl.dot(dy.to(dtype), weight.to(dtype), acc, input_precision=PRECISION)
        mask = m_inside[:, None] & n_inside[None, :]  # [BLOCK_M, BLOCK_N]
        offsets = row * N + (m[:, None] * N + n[None, :])
        out = acc
        if x_ptr is not None:
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            scale = load_vector(scale_ptr, n, n_inside, 1.0)
            shift = load_vector(shift_ptr, n, n_inside, 0.0)
            centred = x - load_vector(mean_ptr, n, n_inside, 0.0)[None, :]
            u, s = activate_and_differentiate(x * scale[None, :] + shift[None, :], ACT)
            # Rows past the end have a gradient of zero, but a derivative.
            s = tl.where(mask, s, 0.0)
            dq_u += tl.sum(acc * u, axis=0)
            s_only += tl.sum(s, axis=0)
            s_x += tl.sum(s * centred, axis=0)
            s *= acc
            dq_s += tl.sum(s, axis=0)
            dq_s_x += tl.sum(s * centred, axis=0)
            if THROUGH:
                out = s * load_row(gate_ptr, group, N, n, n_inside, 1.0)[None, :]
        if residual_ptr is not None:
            out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, out.to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums = sums_ptr + (owner.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 5 * N + n
        tl.store(sums, dq_u, mask=n_inside)
        tl.store(sums + N, dq_s, mask=n_inside)
        tl.store(sums + 2 * N, s_only, mask=n_inside)
        tl.store(sums + 3 * N, dq_s_x, mask=n_inside)
        tl.store(sums + 4 * N, s_x, mask=n_inside)


@triton.jit(do_not_specialize=["rows", "groups", "in_quotient", "out_quotient"])
def pointwise_conv_backward_weight_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    grad_gate_ptr,
    keep_ptr,
    offset_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    partials_ptr,
    rows,
    groups,
    in_quotient,
    out_quotient,
    GRAD_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A partial of dweight[k, c] = sum over rows m of dy[m, k] * act(scale * x + shift)[m, c] * gate[c]."""
    C = in_quotient * IN_DIVISOR
    K = out_quotient * OUT_DIVISOR
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c_inside, k_inside = c < C, k < K
    m = tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(rows, BLOCK_M)
    acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(2), groups * tiles, tl.num_programs(2)):
        group = tile // tiles
        start = (tile % tiles) * BLOCK_M
        m_inside = start + m < rows
        row = group.to(tl.int64) * rows + start
        dy = output_gradient(
            grad_ptr,
            y_ptr,
            coefficients_ptr,
            grad_gate_ptr,
            keep_ptr,
            offset_ptr,
            grad_scale_ptr,
            grad_shift_ptr,
            group,
            K,
            k,
            k_inside,
            row * K + (m[:, None] * K + k[None, :]),
            m_inside[:, None] & k_inside[None, :],
            GRAD_ACT,
        )  # [BLOCK_M, BLOCK_K]
        mask = m_inside[:, None] & c_inside[None, :]  # [BLOCK_M, BLOCK_C]
        a = tl.load(x_ptr + row * C + (m[:, None] * C + c[None, :]), mask=mask, other=0.0)
        if scale_ptr is not None or shift_ptr is not None or gate_ptr is not None or ACT != "none":
            scale = load_vector(scale_ptr, c, c_inside, 1.0)
            shift = load_vector(shift_ptr, c, c_inside, 0.0)
            gate = load_row(gate_ptr, group, C, c, c_inside, 1.0)
            a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT) * gate[None, :]
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        acc = tl.dot(tl.trans(dy.to(dtype)), a.to(dtype), acc, input_precision=PRECISION)
    out = partials_ptr + tl.program_id(2).to(tl.int64) * K * C + (k[:, None] * C + c[None, :])
    tl.store(out, acc, mask=k_inside[:, None] & c_inside[None, :])


@triton.jit(do_not_specialize=["P", "size"])
def sum_partials_kernel(partials_ptr, out_ptr, P, size, BLOCK: tl.constexpr):
    """out[i] = sum over partials p, in order, of partials[p, i]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(P):
        total += tl.load(partials_ptr + p.to(tl.int64) * size + i, mask=inside, other=0.0)
    tl.store(out_ptr + i, total, mask=inside)
