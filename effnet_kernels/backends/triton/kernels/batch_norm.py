"""The kernels of ``backends/triton/batch_norm.py``: passes over maps, and arithmetic on vectors of channels.

Maps are matrices [R, C] of R = G * rows rows (pixels) in G groups: the samples if an operand is by sample, else the
whole batch. P programs of the grid's first dimension share the rows of a group and leave a partial result each.
"""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.tiles import (
    gradient_of_norm,
    load_gradient_vectors,
    load_vector,
    merge_moments,
    sum_within_threads,
)


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def channel_statistics_kernel(
    y_ptr,
    partials_ptr,
    rows,
    c_quotient,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials [P, 3, C]: count, mean and M2 of the channels of y [R, C], of one group."""
    C = c_quotient * C_DIVISOR
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (start + row < rows)[:, None] & inside[None, :]  # [BLOCK_M, BLOCK_C]
        y = tl.load(y_ptr + start * C + (row[:, None] * C + channels[None, :]), mask=mask, other=0.0).to(tl.float32)
        tile_count = tl.minimum(rows - start, BLOCK_M).to(tl.float32)
        tile_mean = tl.sum(y, axis=0) / tile_count  # [BLOCK_C]
        deviation = tl.where(mask, y - tile_mean[None, :], 0.0)  # [BLOCK_M, BLOCK_C]
        count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tl.sum(deviation * deviation, axis=0))
    out = partials_ptr + tl.program_id(0) * 3 * C + channels
    tl.store(out, tl.zeros([BLOCK_C], tl.float32) + count, mask=inside)
    tl.store(out + C, mean, mask=inside)
    tl.store(out + 2 * C, m2, mask=inside)


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def gradient_sums_kernel(
    grad_ptr,
    y_ptr,
    gate_ptr,
    drop_path_scale_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    sums_ptr,
    rows,
    c_quotient,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """sums [G * P, 2, C]: the sums over rows of dz and dz * (y - mean), see :func:`gradient_of_norm`.

    Maps: grad and y [R, C].
    Vectors: scale, shift and mean [C], gate and offset [G, C], drop_path_scale [G].
    """
    C = c_quotient * C_DIVISOR
    group = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    vectors = load_gradient_vectors(
        gate_ptr, drop_path_scale_ptr, offset_ptr, scale_ptr, shift_ptr, group, C, channels, inside
    )
    mean = load_vector(mean_ptr, channels, inside, 0.0)  # [BLOCK_C]
    total = tl.zeros([SUM_ROWS, BLOCK_C], tl.float32)
    centred = tl.zeros([SUM_ROWS, BLOCK_C], tl.float32)
    base = group.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_inside = (start + row < rows)[:, None]  # [BLOCK_M, 1]
        mask = row_inside & inside[None, :]  # [BLOCK_M, BLOCK_C]
        offsets = (base + start) * C + (row[:, None] * C + channels[None, :])  # [BLOCK_M, BLOCK_C]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = gradient_of_norm(
            grad_ptr,
            y,
            offsets,
            mask,
            vectors,
            gate_ptr is not None or drop_path_scale_ptr is not None,
            offset_ptr is not None,
            ACT,
        )  # [BLOCK_M, BLOCK_C]
        dz = tl.where(row_inside, dz, 0.0)
        total += sum_within_threads(dz, SUM_ROWS)
        centred += sum_within_threads(dz * (y - mean[None, :]), SUM_ROWS)
    out = sums_ptr + (group * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channels
    tl.store(out, tl.sum(total, axis=0), mask=inside)
    tl.store(out + C, tl.sum(centred, axis=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def apply_gradient_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    gate_ptr,
    drop_path_scale_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    grad_residual_ptr,
    out_ptr,
    rows,
    c_quotient,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = dy + grad_residual, with dy of :class:`effnet_kernels.fusion.spec.OutputGradient`.

    Maps: grad, y, grad_residual and out [R, C].
    Vectors: coefficients [3, C], scale and shift [C], gate and offset [G, C], drop_path_scale [G].
    """
    C = c_quotient * C_DIVISOR
    group = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    vectors = load_gradient_vectors(
        gate_ptr, drop_path_scale_ptr, offset_ptr, scale_ptr, shift_ptr, group, C, channels, inside
    )
    base = group.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (start + row < rows)[:, None] & inside[None, :]  # [BLOCK_M, BLOCK_C]
        offsets = (base + start) * C + (row[:, None] * C + channels[None, :])  # [BLOCK_M, BLOCK_C]
        y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = gradient_of_norm(
            grad_ptr,
            y,
            offsets,
            mask,
            vectors,
            gate_ptr is not None or drop_path_scale_ptr is not None,
            offset_ptr is not None,
            ACT,
        )  # [BLOCK_M, BLOCK_C]
        if coefficients_ptr is not None:
            alpha = load_vector(coefficients_ptr, channels, inside, 0.0)  # [BLOCK_C]
            beta = load_vector(coefficients_ptr + C, channels, inside, 0.0)  # [BLOCK_C]
            gamma = load_vector(coefficients_ptr + 2 * C, channels, inside, 0.0)  # [BLOCK_C]
            dy = alpha[None, :] * dy + (beta[None, :] * y + gamma[None, :])
        if grad_residual_ptr is not None:
            dy += tl.load(grad_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, dy.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merged_moments(partials_ptr, P, C, channels, inside, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Count, mean and M2, each [BLOCK_C], of the union of partials [P, 3, C].

    There are two passes, because M2 is summed from deviations from the merged mean.
    """
    p = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    count = tl.zeros([BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    pivot = tl.load(partials_ptr + C + channels, mask=inside, other=0.0)  # [BLOCK_C]
    for start in range(0, P, BLOCK_P):
        mask = (start + p < P)[:, None] & inside[None, :]  # [BLOCK_P, BLOCK_C]
        at = partials_ptr + (start + p)[:, None] * (3 * C) + channels[None, :]  # [BLOCK_P, BLOCK_C]
        n = tl.load(at, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        # Means are summed relative to one of them, so that a large mean costs no digits.
        total += tl.sum(n * (tl.load(at + C, mask=mask, other=0.0) - pivot[None, :]), axis=0)
        count += tl.sum(n, axis=0)
    mean = pivot + total / count  # [BLOCK_C]
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        mask = (start + p < P)[:, None] & inside[None, :]  # [BLOCK_P, BLOCK_C]
        at = partials_ptr + (start + p)[:, None] * (3 * C) + channels[None, :]  # [BLOCK_P, BLOCK_C]
        n = tl.load(at, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        deviation = tl.load(at + C, mask=mask, other=0.0) - mean[None, :]  # [BLOCK_P, BLOCK_C]
        m2 += tl.sum(tl.where(mask, tl.load(at + 2 * C, mask=mask, other=0.0) + n * deviation * deviation, 0.0), axis=0)
    return count, mean, m2


@triton.jit(do_not_specialize=["P", "C"])
def merge_statistics_kernel(partials_ptr, stats_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """stats [3, C]: count, mean and M2 of the union of partials [P, 3, C]."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    count, mean, m2 = merged_moments(partials_ptr, P, C, channels, inside, BLOCK_P, BLOCK_C)  # [BLOCK_C]
    tl.store(stats_ptr + channels, count, mask=inside)
    tl.store(stats_ptr + C + channels, mean, mask=inside)
    tl.store(stats_ptr + 2 * C + channels, m2, mask=inside)


@triton.jit(do_not_specialize=["P", "C"])
def finalize_batch_norm_kernel(
    partials_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    folded_ptr,
    P,
    C,
    momentum,
    eps,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """folded [4, C]: scale, shift, mean and rstd, from partial statistics [P, 3, C]. Moves the running statistics, too.

    Vectors: weight, bias, running_mean and running_var [C], any of them None.
    batches: a scalar int64, the number of batches of a cumulative average, or None for ``momentum``.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    count, mean, m2 = merged_moments(partials_ptr, P, C, channels, inside, BLOCK_P, BLOCK_C)  # [BLOCK_C]
    rstd = 1.0 / tl.sqrt(m2 / count + eps)
    scale = rstd * load_vector(weight_ptr, channels, inside, 1.0)
    shift = load_vector(bias_ptr, channels, inside, 0.0) - mean * scale
    tl.store(folded_ptr + channels, scale, mask=inside)
    tl.store(folded_ptr + C + channels, shift, mask=inside)
    tl.store(folded_ptr + 2 * C + channels, mean, mask=inside)
    tl.store(folded_ptr + 3 * C + channels, rstd, mask=inside)
    if running_mean_ptr is not None:
        if batches_ptr is not None:
            momentum = 1.0 / tl.load(batches_ptr).to(tl.float32)
        old_mean = tl.load(running_mean_ptr + channels, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
        old_var = tl.load(running_var_ptr + channels, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
        # Of a single value it is not a number.
        variance = m2 / (count - 1.0)
        # An empty batch moves nothing, as in torch.
        written = inside & (count > 0.0)
        if SKIP_NONFINITE:
            # The difference of a value and itself is zero if it is finite, else NaN.
            written = written & (mean - mean == 0.0) & (m2 - m2 == 0.0)
        # Not old + momentum * (new - old): with a momentum of 1, the old value would leave its rounding errors.
        tl.store(running_mean_ptr + channels, (1.0 - momentum) * old_mean + momentum * mean, mask=written)
        tl.store(running_var_ptr + channels, (1.0 - momentum) * old_var + momentum * variance, mask=written)


@triton.jit(do_not_specialize=["P", "C", "partial_stride", "sum_stride"])
def finalize_batch_norm_backward_kernel(
    sums_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    coefficients_ptr,
    dweight_ptr,
    dbias_ptr,
    P,
    C,
    partial_stride,
    sum_stride,
    reciprocal_count,
    BATCH_STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """coefficients [3, C], dweight [C] and dbias [C], from partial sums of dz and dz * (y - mean).

    sums: [P, 2, C] with strides ``partial_stride`` and ``sum_stride`` and contiguous channels.
    Vectors: weight, or None, mean and rstd [C].
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    p = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    total = tl.zeros([BLOCK_C], tl.float32)
    centred = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        mask = (start + p < P)[:, None] & inside[None, :]  # [BLOCK_P, BLOCK_C]
        at = sums_ptr + (start + p)[:, None] * partial_stride + channels[None, :]  # [BLOCK_P, BLOCK_C]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        centred += tl.sum(tl.load(at + sum_stride, mask=mask, other=0.0), axis=0)
    rstd = tl.load(rstd_ptr + channels, mask=inside, other=0.0)  # [BLOCK_C]
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0)  # [BLOCK_C]
    alpha = rstd * load_vector(weight_ptr, channels, inside, 1.0)
    beta = tl.zeros([BLOCK_C], tl.float32)
    gamma = tl.zeros([BLOCK_C], tl.float32)
    if BATCH_STATISTICS:
        beta = -alpha * rstd * rstd * centred * reciprocal_count
        gamma = -alpha * total * reciprocal_count - beta * mean
    tl.store(coefficients_ptr + channels, alpha, mask=inside)
    tl.store(coefficients_ptr + C + channels, beta, mask=inside)
    tl.store(coefficients_ptr + 2 * C + channels, gamma, mask=inside)
    tl.store(dweight_ptr + channels, rstd * centred, mask=inside)
    tl.store(dbias_ptr + channels, total, mask=inside)
