"""Kernels of the pointwise convolution: GEMMs over maps as matrices [rows, channels], with prologue and epilogue.

Rows are pixels in NHWC order. They come in groups: the samples, where an operand or a result is by sample, else the
whole batch as one group. A tile never crosses a group, so that a gate is one vector for a tile.

Partial results belong to an owner: a sample, or the whole batch. An owner has ``groups`` groups of ``rows`` rows, and
the grid's third dimension counts owners. Blocks are named as in GEMM, C [M, N] = A [M, K] B [K, N].
"""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import (
    activate,
    activate_and_differentiate,
)
from effnet_kernels.backends.triton.kernels.tiles import (
    load_affine,
    load_row,
    load_vector,
    merge_moments,
    output_gradient,
)


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
    """y[m, n] = sum over k of act(scale * x + shift)[m, k] * gate[k] * weight[n, k], then the epilogue.

    M rows, N output channels, K input channels; R = owners * groups * rows, P programs share an owner's row tiles.

    Maps: x [R, K], residual and y [R, N]; without ``y_ptr`` the result is not stored.
    Parameters: weight [N, K], bias [N].
    Prologue: scale and shift [K], gate [owners * groups, K].
    Epilogue: out_scale, out_shift, out_mean and out_var [N], see :func:`load_affine`.
    partials: (count, mean, M2) of the stored values, [P, 3, N], for "statistics" (one owner); their sums,
        [owners, P, N], for "pool".
    """
    K = in_quotient * IN_DIVISOR
    N = out_quotient * OUT_DIVISOR
    owner = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n_inside = n < N
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    tiles = tl.cdiv(rows, BLOCK_M)
    bias = load_vector(bias_ptr, n, n_inside, 0.0)  # [BLOCK_N]
    out_scale, out_shift = load_affine(out_scale_ptr, out_shift_ptr, out_mean_ptr, out_var_ptr, eps, n, n_inside)
    count = 0.0
    # The pooled sums, too, for "pool".
    mean = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), groups * tiles, tl.num_programs(1)):
        group = owner * groups + tile // tiles
        start = (tile % tiles) * BLOCK_M
        m_inside = start + m < rows
        row = group.to(tl.int64) * rows + start
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k_start in range(0, K, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            k_inside = k < K
            a = tl.load(
                x_ptr + row * K + (m[:, None] * K + k[None, :]), mask=m_inside[:, None] & k_inside[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            if scale_ptr is not None or shift_ptr is not None or gate_ptr is not None or ACT != "none":
                scale = load_vector(scale_ptr, k, k_inside, 1.0)  # [BLOCK_K]
                shift = load_vector(shift_ptr, k, k_inside, 0.0)  # [BLOCK_K]
                gate = load_row(gate_ptr, group, K, k, k_inside, 1.0)  # [BLOCK_K]
                # No mask: rows past the end are not stored, and columns past the end are multiplied by zero weights.
                a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT)
                if gate_ptr is not None:
                    a *= gate[None, :]
            weight = tl.load(
                weight_ptr + n[:, None] * K + k[None, :], mask=n_inside[:, None] & k_inside[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_K]
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            acc = tl.dot(a.to(dtype), tl.trans(weight.to(dtype)), acc, input_precision=PRECISION)
        y = acc  # [BLOCK_M, BLOCK_N]
        # The compiler would keep a multiplication by 1 and the addition of 0: they change denormal numbers and -0.
        if bias_ptr is not None:
            y += bias[None, :]
        if out_scale_ptr is not None or out_shift_ptr is not None or out_mean_ptr is not None:
            y = y * out_scale[None, :] + out_shift[None, :]
        y = activate(y, OUT_ACT)
        mask = m_inside[:, None] & n_inside[None, :]  # [BLOCK_M, BLOCK_N]
        offsets = row * N + (m[:, None] * N + n[None, :])  # [BLOCK_M, BLOCK_N]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            stored = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offsets, stored, mask=mask)
            # Statistics are those of the rounded values.
            y = stored.to(tl.float32)
        if REDUCTION == "statistics":
            tile_count = tl.minimum(rows - start, BLOCK_M).to(tl.float32)
            # Columns past the end are not stored, so that rows alone are masked.
            tile_mean = tl.sum(tl.where(m_inside[:, None], y, 0.0), axis=0) / tile_count  # [BLOCK_N]
            deviation = tl.where(m_inside[:, None], y - tile_mean[None, :], 0.0)  # [BLOCK_M, BLOCK_N]
            tile_m2 = tl.sum(deviation * deviation, axis=0)  # [BLOCK_N]
            count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)
        elif REDUCTION == "pool":
            mean += tl.sum(tl.where(m_inside[:, None], y, 0.0), axis=0)
    partial = owner.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if REDUCTION == "statistics":
        out = partials_ptr + partial * 3 * N + n  # [BLOCK_N]
        tl.store(out, tl.zeros([BLOCK_N], tl.float32) + count, mask=n_inside)
        tl.store(out + N, mean, mask=n_inside)
        tl.store(out + 2 * N, m2, mask=n_inside)
    elif REDUCTION == "pool":
        tl.store(partials_ptr + partial * N + n, mean, mask=n_inside)


@triton.jit(do_not_specialize=["rows", "groups", "in_quotient", "out_quotient"])
def pointwise_conv_backward_data_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    out_gate_ptr,
    drop_path_scale_ptr,
    offset_ptr,
    out_scale_ptr,
    out_shift_ptr,
    weight_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    mean_ptr,
    grad_residual_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    groups,
    in_quotient,
    out_quotient,
    OUT_ACT: tl.constexpr,
    ACT: tl.constexpr,
    APPLY_ACT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq[m, n] = sum over k of dy[m, k] * weight[k, n], the gradient of the activated and gated input.

    M rows, N input channels, K output channels; R = owners * groups * rows, P programs share an owner's row tiles.

    The output's gradient, see :func:`output_gradient`: grad and y [R, K], coefficients [3, K], out_scale and out_shift
        [K], out_gate and offset [owners * groups, K], drop_path_scale [owners * groups].
    weight: [K, N].
    The raw input and its prologue, or None: x [R, N], scale, shift and mean [N], gate [owners * groups, N].
    grad_residual: [R, N], a gradient of the input that is added, or None.
    dx: [R, N], dq + grad_residual, or with APPLY_ACT_GRAD gate * dq * act'(scale * x + shift) + grad_residual.
    sums: [owners, P, 3, N] if x is given, over rows, of u = act(scale * x + shift) and u' = act'(scale * x + shift):

        grad_gate = sum of dq * u
        grad_shift = sum of dq * u'
        grad_scale = sum of dq * u' * (x - mean)

    Until the last tile each thread adds up its own elements of the tiles.
    """
    N = in_quotient * IN_DIVISOR
    K = out_quotient * OUT_DIVISOR
    owner = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n_inside = n < N
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    tiles = tl.cdiv(rows, BLOCK_M)
    grad_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_shift = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_scale = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), groups * tiles, tl.num_programs(1)):
        group = owner * groups + tile // tiles
        start = (tile % tiles) * BLOCK_M
        m_inside = start + m < rows
        row = group.to(tl.int64) * rows + start
        mask = m_inside[:, None] & n_inside[None, :]  # [BLOCK_M, BLOCK_N]
        offsets = row * N + (m[:, None] * N + n[None, :])  # [BLOCK_M, BLOCK_N]
        if x_ptr is not None:
            # Asked for before the loop, so that it has come behind it.
            raw = tl.load(x_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        dq = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k_start in range(0, K, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            k_inside = k < K
            dy = output_gradient(
                grad_ptr,
                y_ptr,
                coefficients_ptr,
                out_gate_ptr,
                drop_path_scale_ptr,
                offset_ptr,
                out_scale_ptr,
                out_shift_ptr,
                group,
                K,
                k,
                k_inside,
                row * K + (m[:, None] * K + k[None, :]),
                m_inside[:, None] & k_inside[None, :],
                OUT_ACT,
            )  # [BLOCK_M, BLOCK_K]
            weight = tl.load(
                weight_ptr + k[:, None] * N + n[None, :], mask=k_inside[:, None] & n_inside[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            dtype: tl.constexpr = dx_ptr.dtype.element_ty
            dq = tl.dot(dy.to(dtype), weight.to(dtype), dq, input_precision=PRECISION)
        dx = dq
        if x_ptr is not None:
            # What x is used for has the accumulator's layout. Without a sign of dq in it, the compiler computes the
            # activation twice: in that layout, and in the one of the load. An infinite dq makes NaN of what follows.
            x = raw.to(tl.float32) + 0.0 * dq  # [BLOCK_M, BLOCK_N]
            scale = load_vector(scale_ptr, n, n_inside, 1.0)  # [BLOCK_N]
            shift = load_vector(shift_ptr, n, n_inside, 0.0)  # [BLOCK_N]
            centred = x - load_vector(mean_ptr, n, n_inside, 0.0)[None, :]  # [BLOCK_M, BLOCK_N]
            u, derivative = activate_and_differentiate(x * scale[None, :] + shift[None, :], ACT)  # [BLOCK_M, BLOCK_N]
            # Rows past the end need no mask, because dq is zero in them.
            grad_gate += dq * u
            dz = derivative * dq  # [BLOCK_M, BLOCK_N], without the gate
            grad_shift += dz
            grad_scale += dz * centred
            if APPLY_ACT_GRAD:
                dx = dz
                if gate_ptr is not None:
                    dx *= load_row(gate_ptr, group, N, n, n_inside, 1.0)[None, :]
        if grad_residual_ptr is not None:
            dx += tl.load(grad_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums = sums_ptr + (owner.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3 * N + n  # [BLOCK_N]
        tl.store(sums, tl.sum(grad_gate, axis=0), mask=n_inside)
        tl.store(sums + N, tl.sum(grad_shift, axis=0), mask=n_inside)
        tl.store(sums + 2 * N, tl.sum(grad_scale, axis=0), mask=n_inside)


@triton.jit(do_not_specialize=["rows", "groups", "in_quotient", "out_quotient"])
def pointwise_conv_backward_weight_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    out_gate_ptr,
    drop_path_scale_ptr,
    offset_ptr,
    out_scale_ptr,
    out_shift_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    partials_ptr,
    rows,
    groups,
    in_quotient,
    out_quotient,
    OUT_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_DIVISOR: tl.constexpr,
    OUT_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight[m, n] = sum over k of dy[k, m] * act(scale * x + shift)[k, n] * gate[n], with K split over programs.

    M output channels, N input channels, K rows; R = groups * rows. The grid's third dimension is SPLIT_K.

    The output's gradient, see :func:`output_gradient`: grad and y [R, M], coefficients [3, M], out_scale and out_shift
        [M], out_gate and offset [groups, M], drop_path_scale [groups].
    The input and its prologue: x [R, N], scale and shift [N], gate [groups, N].
    partials: [SPLIT_K, M, N].
    """
    N = in_quotient * IN_DIVISOR
    M = out_quotient * OUT_DIVISOR
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n_inside, m_inside = n < N, m < M
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    tiles = tl.cdiv(rows, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(2), groups * tiles, tl.num_programs(2)):
        group = tile // tiles
        start = (tile % tiles) * BLOCK_K
        k_inside = start + k < rows
        row = group.to(tl.int64) * rows + start
        dy = output_gradient(
            grad_ptr,
            y_ptr,
            coefficients_ptr,
            out_gate_ptr,
            drop_path_scale_ptr,
            offset_ptr,
            out_scale_ptr,
            out_shift_ptr,
            group,
            M,
            m,
            m_inside,
            row * M + (k[:, None] * M + m[None, :]),
            k_inside[:, None] & m_inside[None, :],
            OUT_ACT,
        )  # [BLOCK_K, BLOCK_M]
        mask = k_inside[:, None] & n_inside[None, :]  # [BLOCK_K, BLOCK_N]
        a = tl.load(x_ptr + row * N + (k[:, None] * N + n[None, :]), mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        if scale_ptr is not None or shift_ptr is not None or gate_ptr is not None or ACT != "none":
            scale = load_vector(scale_ptr, n, n_inside, 1.0)  # [BLOCK_N]
            shift = load_vector(shift_ptr, n, n_inside, 0.0)  # [BLOCK_N]
            gate = load_row(gate_ptr, group, N, n, n_inside, 1.0)  # [BLOCK_N]
            a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT)
            if gate_ptr is not None:
                a *= gate[None, :]
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        acc = tl.dot(tl.trans(dy.to(dtype)), a.to(dtype), acc, input_precision=PRECISION)
    out = partials_ptr + tl.program_id(2).to(tl.int64) * M * N + (m[:, None] * N + n[None, :])  # [BLOCK_M, BLOCK_N]
    tl.store(out, acc, mask=m_inside[:, None] & n_inside[None, :])


@triton.jit(do_not_specialize=["P", "size"])
def sum_partials_kernel(partials_ptr, out_ptr, P, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over p of partials[p, i], in the same order at every call: partials [P, size], out [size]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < size
    totals = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        at = partials_ptr + p.to(tl.int64)[:, None] * size + i[None, :]  # [BLOCK_P, BLOCK]
        totals += tl.load(at, mask=(p < P)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + i, tl.sum(totals, axis=0), mask=inside)
