"""Kernels of the depthwise convolution: programs walk down strips of the map, a row at a time.

A program has STRIPS strips of BLOCK_C channels, and every value is a tile [STRIPS, BLOCK_C]: a lane owns a channel of a
strip, that is WIDTH neighbouring columns, each a tile of its own. Every row is loaded and activated once and feeds all
the rows of accumulators that it meets; the oldest are then complete, are stored, and make room.
"""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import activate, activate_and_differentiate, load_affine
from effnet_kernels.backends.triton.kernels.tiles import load_vector


@triton.jit
def load_weights(weight_ptr, c, inside, TAPS: tl.constexpr):
    """The taps of [C, 1, k, k] weights, row by row: a tuple of [1, BLOCK_C]."""
    taps = ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight_ptr + c * TAPS + tap, mask=inside, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def zero_tiles(COUNT: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros([STRIPS, BLOCK_C], tl.float32),)
    return tiles


@triton.jit
def load_columns(strip_ptr, row, column, height, width, C, alive, COLUMNS: tl.constexpr):
    """COLUMNS neighbouring pixels of a row of each strip, from ``column`` on, as stored; zeros outside of the map."""
    row_inside = (row >= 0) & (row < height)
    loaded = ()
    for j in tl.static_range(COLUMNS):
        at = column + j
        mask = alive & (row_inside & (at >= 0) & (at < width))[:, None]
        loaded += (tl.load(strip_ptr + ((row * width + at) * C)[:, None], mask=mask, other=0.0),)
    return loaded


@triton.jit
def load_step(
    x_strip, grad_strip, y_strip, step, top, left, pad_top, pad_left, height, width, out_height, out_width,
    strip_height, C, alive, K: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """What a step of the backward walk reads: STRIDE rows of the input, a row of the gradient and of the output."""
    BEFORE: tl.constexpr = (K - 1) // STRIDE
    rows = ()
    for r in tl.static_range(STRIDE):
        ahead = (step - BEFORE) * STRIDE + K - STRIDE + r
        wanted = alive & (ahead >= 0) & (ahead < strip_height)
        rows += load_columns(x_strip, top + ahead - pad_top, left - pad_left, height, width, C, wanted, WIDTH)
    row, column = top // STRIDE + step - BEFORE, left // STRIDE - BEFORE
    grads = load_columns(grad_strip, row, column, out_height, out_width, C, alive, COLUMNS)
    ys = ()
    if y_strip is not None:
        ys = load_columns(y_strip, row, column, out_height, out_width, C, alive, COLUMNS)
    return rows, grads, ys


@triton.jit
def strip_rows(matrix_ptr, n, C, c, mask, DEFAULT: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The row of an [N, C] matrix that belongs to each strip: [STRIPS, BLOCK_C]."""
    value = tl.full([STRIPS, BLOCK_C], DEFAULT, tl.float32)
    if matrix_ptr is not None:
        value = tl.load(matrix_ptr + (n.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=DEFAULT)
    return value


@triton.jit(
    do_not_specialize=[
        "strips",
        "c_quotient",
        "height",
        "width",
        "out_height",
        "out_width",
        "pad_top",
        "pad_left",
        "row_strips",
        "column_strips",
        "strip_height",
        "first_step",
    ]
)
def depthwise_conv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_scale_ptr,
    out_shift_ptr,
    out_mean_ptr,
    out_var_ptr,
    y_ptr,
    partials_ptr,
    strips,
    c_quotient,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    row_strips,
    column_strips,
    strip_height,
    first_step,
    eps,
    ACT: tl.constexpr,
    OUT_ACT: tl.constexpr,
    REDUCTION: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = c_quotient * C_DIVISOR
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    weights = load_weights(weight_ptr, c, inside, K * K)
    scale = load_vector(scale_ptr, c, inside, 1.0)[None, :]
    shift = load_vector(shift_ptr, c, inside, 0.0)[None, :]
    out_scale, out_shift = load_affine(out_scale_ptr, out_shift_ptr, out_mean_ptr, out_var_ptr, eps, c, inside)
    out_scale, out_shift = out_scale[None, :], out_shift[None, :]
    # An output row meets the input rows of AGES steps; a step brings STRIDE of them.
    AGES: tl.constexpr = (K + STRIDE - 1) // STRIDE
    COLUMNS: tl.constexpr = STRIDE * (WIDTH - 1) + K
    count = tl.zeros([STRIPS], tl.float32)
    pivot = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    total = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    squares = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * STRIPS, strips, tl.num_programs(0) * STRIPS):
        strip = first + tl.arange(0, STRIPS)
        n = strip // (row_strips * column_strips)
        out_row = strip // column_strips % row_strips * strip_height
        out_column = strip % column_strips * WIDTH
        alive = (strip < strips)[:, None] & inside[None, :]  # [STRIPS, BLOCK_C]
        rows = tl.minimum(out_height - out_row, strip_height)  # [STRIPS]
        x_strip = x_ptr + (n.to(tl.int64) * height * width * C)[:, None] + c[None, :]
        y_strip = y_ptr + (n.to(tl.int64) * out_height * out_width * C)[:, None] + c[None, :]
        column = out_column * STRIDE - pad_left
        accumulators = zero_tiles(AGES * WIDTH, STRIPS, BLOCK_C)
        if REDUCTION == "pool":
            total = tl.zeros([STRIPS, BLOCK_C], tl.float32)
        first_row = (out_row + first_step) * STRIDE - pad_top
        loaded = load_columns(x_strip, first_row, column, height, width, C, alive, COLUMNS)
        for step in range(first_step, strip_height + AGES - 1):
            for phase in tl.static_range(STRIDE):
                row = (out_row + step) * STRIDE + phase - pad_top
                row_inside = (row >= 0) & (row < height)
                raw = loaded
                # The next row is on its way while this one is computed.
                loaded = load_columns(x_strip, row + 1, column, height, width, C, alive, COLUMNS)
                values = ()
                for j in tl.static_range(COLUMNS):
                    value = raw[j].to(tl.float32)
                    if scale_ptr is not None or shift_ptr is not None or ACT != "none":
                        # The padding is of zeros after the activation.
                        mask = alive & (row_inside & (column + j >= 0) & (column + j < width))[:, None]
                        value = tl.where(mask, activate(value * scale + shift, ACT), 0.0)
                    values += (value,)
                fed = ()
                for index in tl.static_range(AGES * WIDTH):
                    accumulator = accumulators[index]
                    if STRIDE * (AGES - 1 - index // WIDTH) + phase < K:
                        for tap in tl.static_range(K):
                            accumulator += (
                                values[STRIDE * (index % WIDTH) + tap]
                                * weights[(STRIDE * (AGES - 1 - index // WIDTH) + phase) * K + tap]
                            )
                    fed += (accumulator,)
                accumulators = fed
            done = step - (AGES - 1)
            row_done = (done >= 0) & (done < rows)  # [STRIPS]
            finished = ()
            for j in tl.static_range(WIDTH):
                mask = alive & (row_done & (out_column + j < out_width))[:, None]
                y = activate(accumulators[j] * out_scale + out_shift, OUT_ACT).to(y_ptr.dtype.element_ty)
                at = ((out_row + done) * out_width + out_column + j) * C
                tl.store(y_strip + at[:, None], y, mask=mask)
                if REDUCTION != "none":
                    y = tl.where(mask, y.to(tl.float32), 0.0)
                if REDUCTION == "pool":
                    total += y
                finished += (y,)
            if REDUCTION == "statistics":
                columns = tl.where((strip < strips) & row_done, tl.minimum(out_width - out_column, WIDTH), 0)
                columns = columns.to(tl.float32)
                row_sum = tl.zeros([STRIPS, BLOCK_C], tl.float32)
                for j in tl.static_range(WIDTH):
                    row_sum += finished[j]
                # Deviations from the mean of the first row that a lane sees: near enough to the mean that squares of
                # deviations lose no digits, however large the mean is.
                fresh = (count == 0.0) & (columns > 0.0)
                pivot = tl.where(fresh[:, None], row_sum / tl.maximum(columns, 1.0)[:, None], pivot)
                for j in tl.static_range(WIDTH):
                    seen = (j < columns)[:, None]
                    deviation = tl.where(seen, finished[j] - pivot, 0.0)
                    total += deviation
                    squares += deviation * deviation
                count += columns
            accumulators = accumulators[WIDTH:] + zero_tiles(WIDTH, STRIPS, BLOCK_C)
        if REDUCTION == "pool":
            tl.store(partials_ptr + (strip.to(tl.int64) * C)[:, None] + c[None, :], total, mask=alive)
    if REDUCTION == "statistics":
        safe = tl.maximum(count, 1.0)[:, None]
        mean = pivot + total / safe
        m2 = squares - total * total / safe
        # The lanes' moments merged, relative to one of them.
        all_count = tl.sum(count, axis=0)
        weight = count[:, None] / tl.maximum(all_count, 1.0)
        reference = tl.sum(tl.where(tl.arange(0, STRIPS)[:, None] == 0, mean, 0.0), axis=0)
        merged = reference + tl.sum(weight * (mean - reference[None, :]), axis=0)
        deviation = mean - merged[None, :]
        merged_m2 = tl.sum(m2 + count[:, None] * deviation * deviation, axis=0)
        out = partials_ptr + tl.program_id(0) * 3 * C + c
        tl.store(out, tl.zeros([BLOCK_C], tl.float32) + all_count, mask=inside)
        tl.store(out + C, merged, mask=inside)
        tl.store(out + 2 * C, merged_m2, mask=inside)


@triton.jit(
    do_not_specialize=[
        "strips",
        "c_quotient",
        "height",
        "width",
        "out_height",
        "out_width",
        "pad_top",
        "pad_left",
        "row_strips",
        "column_strips",
        "strip_height",
    ]
)
def depthwise_conv_backward_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    gate_ptr,
    offset_ptr,
    out_scale_ptr,
    out_shift_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    residual_ptr,
    dz_ptr,
    sums_ptr,
    dweight_ptr,
    strips,
    c_quotient,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    row_strips,
    column_strips,
    strip_height,
    OUT_ACT: tl.constexpr,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz and dweight in one walk over the output's rows.

    Output row t meets the padded input rows STRIDE * t + tap, tap < K: each of them gets a share of the data gradient,
    and gives its activation to the weight gradient. Both windows hold K rows; a step completes STRIDE of them.
    """
    C = c_quotient * C_DIVISOR
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    weights = load_weights(weight_ptr, c, inside, K * K)
    scale = load_vector(scale_ptr, c, inside, 1.0)[None, :]
    shift = load_vector(shift_ptr, c, inside, 0.0)[None, :]
    mean = load_vector(mean_ptr, c, inside, 0.0)[None, :]
    out_scale = load_vector(out_scale_ptr, c, inside, 1.0)[None, :]
    out_shift = load_vector(out_shift_ptr, c, inside, 0.0)[None, :]
    if coefficients_ptr is not None:
        alpha = load_vector(coefficients_ptr, c, inside, 0.0)[None, :]
        beta = load_vector(coefficients_ptr + C, c, inside, 0.0)[None, :]
        gamma = load_vector(coefficients_ptr + 2 * C, c, inside, 0.0)[None, :]
    # Of the output's columns a lane's own meet WIDTH // STRIDE and BEFORE to their left.
    BEFORE: tl.constexpr = (K - 1) // STRIDE
    COLUMNS: tl.constexpr = WIDTH // STRIDE + BEFORE
    dweights = zero_tiles(K * K, STRIPS, BLOCK_C)
    sum_dz = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    sum_centred = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * STRIPS, strips, tl.num_programs(0) * STRIPS):
        strip = first + tl.arange(0, STRIPS)
        n = strip // (row_strips * column_strips)
        # Rows and columns count from the padding's corner; a strip begins at a multiple of the stride.
        top = pad_top // STRIDE * STRIDE + strip // column_strips % row_strips * strip_height
        left = pad_left // STRIDE * STRIDE + strip % column_strips * WIDTH
        alive = (strip < strips)[:, None] & inside[None, :]  # [STRIPS, BLOCK_C]
        x_offset = (n.to(tl.int64) * height * width * C)[:, None] + c[None, :]
        y_offset = (n.to(tl.int64) * out_height * out_width * C)[:, None] + c[None, :]
        x_strip, dz_strip, grad_strip = x_ptr + x_offset, dz_ptr + x_offset, grad_ptr + y_offset
        y_strip = None if y_ptr is None else y_ptr + y_offset
        gate = strip_rows(gate_ptr, n, C, c, alive, 1.0, STRIPS, BLOCK_C)
        offset = strip_rows(offset_ptr, n, C, c, alive, 0.0, STRIPS, BLOCK_C)
        accumulators = zero_tiles(K * WIDTH, STRIPS, BLOCK_C)
        window = zero_tiles(K * WIDTH, STRIPS, BLOCK_C)
        loaded = load_step(
            x_strip, grad_strip, y_strip, 0, top, left, pad_top, pad_left, height, width, out_height, out_width,
            strip_height, C, alive, K, STRIDE, WIDTH, COLUMNS
        )  # fmt: skip
        for step in range(strip_height // STRIDE + BEFORE):
            relative = (step - BEFORE) * STRIDE  # of the step's first padded row, from the strip's top
            raw_rows, raw_grads, raw_ys = loaded
            # The next step's rows are on their way while this one is computed.
            loaded = load_step(
                x_strip, grad_strip, y_strip, step + 1, top, left, pad_top, pad_left, height, width, out_height,
                out_width, strip_height, C, alive, K, STRIDE, WIDTH, COLUMNS
            )  # fmt: skip
            out_row = top // STRIDE + step - BEFORE
            out_column = left // STRIDE - BEFORE
            # The activations of the rows that the window gains.
            gained = ()
            for index in tl.static_range(STRIDE * WIDTH):
                u = raw_rows[index].to(tl.float32)
                if scale_ptr is not None or shift_ptr is not None or ACT != "none":
                    ahead = relative + K - STRIDE + index // WIDTH
                    row = top + ahead - pad_top
                    at = left + index % WIDTH - pad_left
                    mask = (
                        (ahead >= 0) & (ahead < strip_height) & (row >= 0) & (row < height) & (at >= 0) & (at < width)
                    )
                    u = tl.where(alive & mask[:, None], activate(u * scale + shift, ACT), 0.0)
                gained += (u,)
            window = window[STRIDE * WIDTH :] + gained
            # The gradient of the output's row, formed from what has been stored.
            gradients = ()
            for j in tl.static_range(COLUMNS):
                at = out_column + j
                mask = alive & ((out_row >= 0) & (out_row < out_height) & (at >= 0) & (at < out_width))[:, None]
                dy = raw_grads[j].to(tl.float32) * gate + offset
                if y_ptr is not None:
                    y = raw_ys[j].to(tl.float32)
                    if OUT_ACT != "none":
                        _, derivative = activate_and_differentiate(y * out_scale + out_shift, OUT_ACT)
                        dy *= derivative
                    if coefficients_ptr is not None:
                        dy = alpha * dy + (beta * y + gamma)
                gradients += (tl.where(mask, dy, 0.0),)
            fed = ()
            for index in tl.static_range(K * WIDTH):
                accumulator = accumulators[index]
                for tap in tl.static_range(K):
                    if (index % WIDTH - tap) % STRIDE == 0:
                        accumulator += (
                            gradients[(index % WIDTH - tap + BEFORE * STRIDE) // STRIDE]
                            * weights[index // WIDTH * K + tap]
                        )
                fed += (accumulator,)
            summed = ()
            for index in tl.static_range(K * K):
                dweight = dweights[index]
                for j in tl.static_range(WIDTH):
                    if (j - index % K) % STRIDE == 0:
                        dweight += (
                            gradients[(j - index % K + BEFORE * STRIDE) // STRIDE] * window[index // K * WIDTH + j]
                        )
                summed += (dweight,)
            dweights = summed
            for index in tl.static_range(STRIDE * WIDTH):
                done = relative + index // WIDTH
                row = top + done - pad_top
                at = left + index % WIDTH - pad_left
                mask = (done >= 0) & (done < strip_height) & (row >= 0) & (row < height) & (at >= 0) & (at < width)
                mask = alive & mask[:, None]
                here = ((row * width + at) * C)[:, None]
                dz = fed[index]
                if scale_ptr is not None or shift_ptr is not None or ACT != "none" or mean_ptr is not None:
                    # Loaded again rather than held for K steps: it is in the cache still, registers are scarce.
                    x = tl.load(x_strip + here, mask=mask, other=0.0).to(tl.float32)
                    _, derivative = activate_and_differentiate(x * scale + shift, ACT)
                    dz = tl.where(mask, dz * derivative, 0.0)
                    sum_dz += dz
                    sum_centred += dz * (x - mean)
                if residual_ptr is not None:
                    dz += tl.load(residual_ptr + x_offset + here, mask=mask, other=0.0).to(tl.float32)
                tl.store(dz_strip + here, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            accumulators = fed[STRIDE * WIDTH :] + zero_tiles(STRIDE * WIDTH, STRIPS, BLOCK_C)
    if sums_ptr is not None:
        out = sums_ptr + tl.program_id(0) * 2 * C + c
        tl.store(out, tl.sum(sum_dz, axis=0), mask=inside)
        tl.store(out + C, tl.sum(sum_centred, axis=0), mask=inside)
    for index in tl.static_range(K * K):
        out = dweight_ptr + tl.program_id(0) * K * K * C + c * (K * K) + index
        tl.store(out, tl.sum(dweights[index], axis=0), mask=inside)
