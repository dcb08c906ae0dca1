"""The depthwise convolution's backward kernel, which walks down strips as :mod:`.depthwise` does."""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import activate, activate_and_differentiate
from effnet_kernels.backends.triton.kernels.depthwise import load_columns, load_weights, zero_tiles
from effnet_kernels.backends.triton.kernels.tiles import load_vector


@triton.jit
def load_step(
    x_strip, grad_strip, y_strip, step, top, left, pad_top, pad_left, height, width, out_height, out_width,
    strip_height, C, valid, K: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The pixels that a step reads: STRIDE rows of the input, one of the output's gradient and one of the output.

    Each of the three results is a tuple of tiles [STRIPS, BLOCK_C], see :func:`load_columns`.
    """
    BEFORE: tl.constexpr = (K - 1) // STRIDE
    rows = ()
    for r in tl.static_range(STRIDE):
        strip_row = (step - BEFORE) * STRIDE + K - STRIDE + r
        in_strip = valid & (strip_row >= 0) & (strip_row < strip_height)
        rows += load_columns(x_strip, top + strip_row - pad_top, left - pad_left, height, width, C, in_strip, WIDTH)
    row, column = top // STRIDE + step - BEFORE, left // STRIDE - BEFORE
    grads = load_columns(grad_strip, row, column, out_height, out_width, C, valid, COLUMNS)
    ys = ()
    if y_strip is not None:
        ys = load_columns(y_strip, row, column, out_height, out_width, C, valid, COLUMNS)
    return rows, grads, ys


@triton.jit
def load_rows_of_strips(matrix_ptr, n, C, c, mask, DEFAULT: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Each strip's row ``n`` [STRIPS, 1] of a matrix [N, C]: [STRIPS, BLOCK_C], the default if the matrix is None."""
    value = tl.full([STRIPS, BLOCK_C], DEFAULT, tl.float32)
    if matrix_ptr is not None:
        value = tl.load(matrix_ptr + n.to(tl.int64) * C + c[None, :], mask=mask, other=DEFAULT)
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
    ]
)
def depthwise_conv_backward_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    out_gate_ptr,
    offset_ptr,
    out_scale_ptr,
    out_shift_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    grad_residual_ptr,
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
    """The gradients of z = scale * x + shift and of the weight, in one walk over the output's rows.

    Output row t is computed from the padded input rows STRIDE * t + tap, tap < K. Its gradient contributes to their
    data gradients, and with their activations to the weight gradient. So a program holds K rows of activations
    (``window``) and K rows of data gradients (``accumulators``), and a step completes STRIDE of the latter.

    The output's gradient, see :class:`effnet_kernels.fusion.spec.OutputGradient`: grad and y
        [N, out_height, out_width, C], coefficients [3, C], out_gate and offset [N, C], out_scale and out_shift [C].
    The input and its prologue: x [N, height, width, C], scale and shift [C], or None if x is not a raw output.
    weight: [C, 1, K, K]. mean: [C] or None.
    grad_residual: [N, height, width, C], a gradient of x that is added, or None.
    dz: [N, height, width, C], plus grad_residual.
    sums: [P, 2, C] for P programs of the grid's first dimension, of dz and of dz * (x - mean).
    dweight: [P, C, 1, K, K].
    """
    C = c_quotient * C_DIVISOR
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = c < C
    weights = load_weights(weight_ptr, c, inside, K * K)
    scale = load_vector(scale_ptr, c, inside, 1.0)[None, :]  # [1, BLOCK_C]
    shift = load_vector(shift_ptr, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
    mean = load_vector(mean_ptr, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
    out_scale = load_vector(out_scale_ptr, c, inside, 1.0)[None, :]  # [1, BLOCK_C]
    out_shift = load_vector(out_shift_ptr, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
    if coefficients_ptr is not None:
        alpha = load_vector(coefficients_ptr, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
        beta = load_vector(coefficients_ptr + C, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
        gamma = load_vector(coefficients_ptr + 2 * C, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
    # A lane's input columns contribute to WIDTH // STRIDE columns of the output, and to BEFORE columns left of them.
    BEFORE: tl.constexpr = (K - 1) // STRIDE
    COLUMNS: tl.constexpr = WIDTH // STRIDE + BEFORE
    # Registers hold the window's raw inputs, too, and the derivatives of their activations, where there are enough:
    # what is loaded again has to be waited for, because nothing is left to do beside it.
    KEEPS_SLOPES: tl.constexpr = K == 3 and ACT != "none"
    KEEPS_INPUTS: tl.constexpr = KEEPS_SLOPES or (
        K == 5 and ACT != "none" and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    dweights = zero_tiles(K * K, STRIPS, BLOCK_C)
    sum_dz = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    sum_centred = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * STRIPS, strips, tl.num_programs(0) * STRIPS):
        strip = (first + tl.arange(0, STRIPS))[:, None]  # [STRIPS, 1], as n, top and left
        n = strip // (row_strips * column_strips)
        # Rows and columns count from the padding's corner, and a strip begins at a multiple of the stride.
        top = pad_top // STRIDE * STRIDE + strip // column_strips % row_strips * strip_height
        left = pad_left // STRIDE * STRIDE + strip % column_strips * WIDTH
        valid = (strip < strips) & inside[None, :]  # [STRIPS, BLOCK_C]
        x_offset = n.to(tl.int64) * height * width * C + c[None, :]  # [STRIPS, BLOCK_C]
        y_offset = n.to(tl.int64) * out_height * out_width * C + c[None, :]  # [STRIPS, BLOCK_C]
        x_strip, dz_strip, grad_strip = x_ptr + x_offset, dz_ptr + x_offset, grad_ptr + y_offset
        y_strip = None if y_ptr is None else y_ptr + y_offset
        gate = load_rows_of_strips(out_gate_ptr, n, C, c, valid, 1.0, STRIPS, BLOCK_C)  # [STRIPS, BLOCK_C]
        offset = load_rows_of_strips(offset_ptr, n, C, c, valid, 0.0, STRIPS, BLOCK_C)  # [STRIPS, BLOCK_C]
        accumulators = zero_tiles(K * WIDTH, STRIPS, BLOCK_C)
        window = zero_tiles(K * WIDTH, STRIPS, BLOCK_C)
        raw_window, slopes = (), ()
        if KEEPS_SLOPES:
            slopes = zero_tiles(K * WIDTH, STRIPS, BLOCK_C)
        if KEEPS_INPUTS:
            raw_window = zero_tiles(K * WIDTH, STRIPS, BLOCK_C, x_ptr.dtype.element_ty)
        loaded = load_step(
            x_strip, grad_strip, y_strip, 0, top, left, pad_top, pad_left, height, width, out_height, out_width,
            strip_height, C, valid, K, STRIDE, WIDTH, COLUMNS
        )  # fmt: skip
        for step in range(strip_height // STRIDE + BEFORE):
            relative = (step - BEFORE) * STRIDE  # of the step's first padded row, from the strip's top
            raw_rows, raw_grads, raw_ys = loaded
            # The next step's rows are loaded while this one is computed.
            loaded = load_step(
                x_strip, grad_strip, y_strip, step + 1, top, left, pad_top, pad_left, height, width, out_height,
                out_width, strip_height, C, valid, K, STRIDE, WIDTH, COLUMNS
            )  # fmt: skip
            out_row = top // STRIDE + step - BEFORE  # [STRIPS, 1]
            out_column = left // STRIDE - BEFORE  # [STRIPS, 1]
            # The activations of the rows that enter the window.
            entering, entering_slopes = (), ()
            for index in tl.static_range(STRIDE * WIDTH):
                u = raw_rows[index].to(tl.float32)  # [STRIPS, BLOCK_C]
                if scale_ptr is not None or shift_ptr is not None or ACT != "none":
                    strip_row = relative + K - STRIDE + index // WIDTH
                    row = top + strip_row - pad_top
                    at = left + index % WIDTH - pad_left
                    mask = (
                        (strip_row >= 0)
                        & (strip_row < strip_height)
                        & (row >= 0)
                        & (row < height)
                        & (at >= 0)
                        & (at < width)
                    )
                    if KEEPS_SLOPES:
                        u, slope = activate_and_differentiate(u * scale + shift, ACT)
                        entering_slopes += (slope,)
                    else:
                        u = activate(u * scale + shift, ACT)
                    u = tl.where(valid & mask, u, 0.0)
                entering += (u,)
            window = window[STRIDE * WIDTH :] + entering
            if KEEPS_SLOPES:
                slopes = slopes[STRIDE * WIDTH :] + entering_slopes
            if KEEPS_INPUTS:
                raw_window = raw_window[STRIDE * WIDTH :] + raw_rows
            # dy of the output's row.
            gradients = ()
            for j in tl.static_range(COLUMNS):
                at = out_column + j
                mask = valid & ((out_row >= 0) & (out_row < out_height) & (at >= 0) & (at < out_width))
                dy = raw_grads[j].to(tl.float32)  # [STRIPS, BLOCK_C]
                # The compiler would keep a multiplication by 1 and the addition of 0.
                if out_gate_ptr is not None:
                    dy *= gate
                if offset_ptr is not None:
                    dy += offset
                if y_ptr is not None:
                    y = raw_ys[j].to(tl.float32)  # [STRIPS, BLOCK_C]
                    if OUT_ACT != "none":
                        _, derivative = activate_and_differentiate(y * out_scale + out_shift, OUT_ACT)
                        dy *= derivative
                    if coefficients_ptr is not None:
                        dy = alpha * dy + (beta * y + gamma)
                gradients += (tl.where(mask, dy, 0.0),)
            updated = ()
            for index in tl.static_range(K * WIDTH):
                accumulator = accumulators[index]
                for tap in tl.static_range(K):
                    if (index % WIDTH - tap) % STRIDE == 0:
                        accumulator += (
                            gradients[(index % WIDTH - tap + BEFORE * STRIDE) // STRIDE]
                            * weights[index // WIDTH * K + tap]
                        )
                updated += (accumulator,)
            updated_dweights = ()
            for index in tl.static_range(K * K):
                dweight = dweights[index]
                for j in tl.static_range(WIDTH):
                    if (j - index % K) % STRIDE == 0:
                        dweight += (
                            gradients[(j - index % K + BEFORE * STRIDE) // STRIDE] * window[index // K * WIDTH + j]
                        )
                updated_dweights += (dweight,)
            dweights = updated_dweights
            for index in tl.static_range(STRIDE * WIDTH):
                done = relative + index // WIDTH
                row = top + done - pad_top
                at = left + index % WIDTH - pad_left
                mask = (done >= 0) & (done < strip_height) & (row >= 0) & (row < height) & (at >= 0) & (at < width)
                mask = valid & mask
                here = (row * width + at) * C  # [STRIPS, 1]
                dz = updated[index]
                if scale_ptr is not None or shift_ptr is not None or ACT != "none" or mean_ptr is not None:
                    if KEEPS_INPUTS:
                        x = raw_window[index].to(tl.float32)
                    else:
                        x = tl.load(x_strip + here, mask=mask, other=0.0).to(tl.float32)
                    if KEEPS_SLOPES:
                        derivative = slopes[index]
                    else:
                        _, derivative = activate_and_differentiate(x * scale + shift, ACT)
                    dz = tl.where(mask, dz * derivative, 0.0)
                    sum_dz += dz
                    sum_centred += dz * (x - mean)
                if grad_residual_ptr is not None:
                    dz += tl.load(grad_residual_ptr + x_offset + here, mask=mask, other=0.0).to(tl.float32)
                tl.store(dz_strip + here, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            accumulators = updated[STRIDE * WIDTH :] + zero_tiles(STRIDE * WIDTH, STRIPS, BLOCK_C)
    if sums_ptr is not None:
        out = sums_ptr + tl.program_id(0) * 2 * C + c
        tl.store(out, tl.sum(sum_dz, axis=0), mask=inside)
        tl.store(out + C, tl.sum(sum_centred, axis=0), mask=inside)
    for index in tl.static_range(K * K):
        out = dweight_ptr + tl.program_id(0) * K * K * C + c * (K * K) + index
        tl.store(out, tl.sum(dweights[index], axis=0), mask=inside)
