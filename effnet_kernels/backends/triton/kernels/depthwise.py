"""The depthwise convolution's kernel: programs walk down strips of the map, a row at a time.

A program computes STRIPS strips in BLOCK_C channels at a time, and every value is a tile [STRIPS, BLOCK_C]. A lane owns
one channel of one strip, and WIDTH neighbouring columns of it, each of which is a tile. Every input row is loaded and
activated once, and is added to all rows of accumulators that it contributes to. The oldest of these are then complete:
they are stored and make room for new ones.
"""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import activate
from effnet_kernels.backends.triton.kernels.tiles import load_affine, load_vector


@triton.jit
def load_weights(weight_ptr, c, inside, TAPS: tl.constexpr):
    """The taps of weights [C, 1, K, K], row by row: a tuple of TAPS tiles [1, BLOCK_C]."""
    taps = ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight_ptr + c * TAPS + tap, mask=inside, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def zero_tiles(COUNT: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """A tuple of COUNT tiles [STRIPS, BLOCK_C] of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros([STRIPS, BLOCK_C], dtype),)
    return tiles


@triton.jit
def load_columns(strip_ptr, row, column, height, width, C, valid, COLUMNS: tl.constexpr):
    """COLUMNS neighbouring pixels of a row of each strip, from ``column`` on: a tuple of tiles [STRIPS, BLOCK_C].

    Values have the map's dtype and are zero outside of the map. ``strip_ptr`` [STRIPS, BLOCK_C] points to the first
    pixel of each strip's sample, ``row`` and ``column`` [STRIPS, 1] count in the map, and ``valid`` [STRIPS, BLOCK_C]
    is false where there is no such strip or channel.
    """
    row_inside = (row >= 0) & (row < height)  # [STRIPS, 1]
    row_ptr = strip_ptr + (row * width + column) * C  # [STRIPS, BLOCK_C]
    loaded = ()
    for j in tl.static_range(COLUMNS):
        at = column + j  # [STRIPS, 1]
        mask = valid & (row_inside & (at >= 0) & (at < width))  # [STRIPS, BLOCK_C]
        loaded += (tl.load(row_ptr + j * C, mask=mask, other=0.0),)
    return loaded


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
    MERGES: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act(out_scale * v + out_shift), v the convolution of act(scale * x + shift) after padding it with zeros.

    Maps: x [N, height, width, C], y [N, out_height, out_width, C].
    Parameters: weight [C, 1, K, K].
    Prologue: scale and shift [C]. Epilogue: out_scale, out_shift, out_mean and out_var [C], see :func:`load_affine`.
    partials: (count, mean, M2) of the stored values, [P, 3, C] for P programs of the grid's first dimension, for
        "statistics"; their sums, [N, row_strips * column_strips, C], for "pool", of which MERGES adds up STRIPS at a
        time: then no STRIPS strips may be of different samples.

    ``strips`` strips of ``strip_height`` by WIDTH pixels of the output, row_strips by column_strips a sample. The steps
    before ``first_step`` read padding alone.
    """
    C = c_quotient * C_DIVISOR
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = c < C
    weights = load_weights(weight_ptr, c, inside, K * K)
    scale = load_vector(scale_ptr, c, inside, 1.0)[None, :]  # [1, BLOCK_C]
    shift = load_vector(shift_ptr, c, inside, 0.0)[None, :]  # [1, BLOCK_C]
    out_scale, out_shift = load_affine(out_scale_ptr, out_shift_ptr, out_mean_ptr, out_var_ptr, eps, c, inside)
    out_scale, out_shift = out_scale[None, :], out_shift[None, :]  # [1, BLOCK_C]
    # A step reads STRIDE input rows and completes one output row. The K input rows of an output row take OUT_ROWS
    # steps, so that as many output rows are accumulated at a time.
    OUT_ROWS: tl.constexpr = (K + STRIDE - 1) // STRIDE
    COLUMNS: tl.constexpr = STRIDE * (WIDTH - 1) + K
    # Vectors of strips are [STRIPS, 1] throughout: threads would exchange those of [STRIPS] through shared memory.
    count = tl.zeros([STRIPS, 1], tl.float32)
    pivot = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    total = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    squares = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * STRIPS, strips, tl.num_programs(0) * STRIPS):
        strip = (first + tl.arange(0, STRIPS))[:, None]  # [STRIPS, 1], as n, out_row and out_column
        n = strip // (row_strips * column_strips)
        out_row = strip // column_strips % row_strips * strip_height
        out_column = strip % column_strips * WIDTH
        valid = (strip < strips) & inside[None, :]  # [STRIPS, BLOCK_C]
        rows = tl.minimum(out_height - out_row, strip_height)  # [STRIPS, 1]
        x_strip = x_ptr + n.to(tl.int64) * height * width * C + c[None, :]  # [STRIPS, BLOCK_C]
        y_strip = y_ptr + n.to(tl.int64) * out_height * out_width * C + c[None, :]  # [STRIPS, BLOCK_C]
        column = out_column * STRIDE - pad_left  # [STRIPS, 1]
        accumulators = zero_tiles(OUT_ROWS * WIDTH, STRIPS, BLOCK_C)
        if REDUCTION == "pool":
            total = tl.zeros([STRIPS, BLOCK_C], tl.float32)
        first_row = (out_row + first_step) * STRIDE - pad_top
        loaded = load_columns(x_strip, first_row, column, height, width, C, valid, COLUMNS)
        for step in range(first_step, strip_height + OUT_ROWS - 1):
            for phase in tl.static_range(STRIDE):
                row = (out_row + step) * STRIDE + phase - pad_top  # [STRIPS, 1]
                row_inside = (row >= 0) & (row < height)
                raw = loaded
                # The next row is loaded while this one is computed.
                loaded = load_columns(x_strip, row + 1, column, height, width, C, valid, COLUMNS)
                values = ()
                for j in tl.static_range(COLUMNS):
                    value = raw[j].to(tl.float32)  # [STRIPS, BLOCK_C]
                    if scale_ptr is not None or shift_ptr is not None or ACT != "none":
                        # Padding is zero after the activation, not before it.
                        mask = valid & (row_inside & (column + j >= 0) & (column + j < width))
                        value = tl.where(mask, activate(value * scale + shift, ACT), 0.0)
                    values += (value,)
                updated = ()
                for index in tl.static_range(OUT_ROWS * WIDTH):
                    accumulator = accumulators[index]
                    if STRIDE * (OUT_ROWS - 1 - index // WIDTH) + phase < K:
                        for tap in tl.static_range(K):
                            accumulator += (
                                values[STRIDE * (index % WIDTH) + tap]
                                * weights[(STRIDE * (OUT_ROWS - 1 - index // WIDTH) + phase) * K + tap]
                            )
                    updated += (accumulator,)
                accumulators = updated
            done = step - (OUT_ROWS - 1)  # the output row that is complete, from the strip's top
            row_done = (done >= 0) & (done < rows)  # [STRIPS, 1]
            row_ptr = y_strip + ((out_row + done) * out_width + out_column) * C  # [STRIPS, BLOCK_C]
            finished, masks = (), ()
            for j in tl.static_range(WIDTH):
                mask = valid & (row_done & (out_column + j < out_width))  # [STRIPS, BLOCK_C]
                y = accumulators[j]
                if out_scale_ptr is not None or out_shift_ptr is not None or out_mean_ptr is not None:
                    y = y * out_scale + out_shift
                y = activate(y, OUT_ACT).to(y_ptr.dtype.element_ty)
                tl.store(row_ptr + j * C, y, mask=mask)
                finished += (y.to(tl.float32),)
                masks += (mask,)
            if REDUCTION == "pool":
                for j in tl.static_range(WIDTH):
                    total += tl.where(masks[j], finished[j], 0.0)
            if REDUCTION == "statistics":
                if (first == tl.program_id(0) * STRIPS) & (done == 0):
                    # Deviations are from the mean of a lane's first row. It is so near to the mean of all rows that
                    # squares of deviations keep their digits, however large the mean is.
                    for j in tl.static_range(WIDTH):
                        pivot += tl.where(masks[j], finished[j], 0.0)
                    pivot /= tl.minimum(out_width - out_column, WIDTH).to(tl.float32)
                for j in tl.static_range(WIDTH):
                    deviation = tl.where(masks[j], finished[j] - pivot, 0.0)  # [STRIPS, BLOCK_C]
                    total += deviation
                    squares += deviation * deviation
            accumulators = accumulators[WIDTH:] + zero_tiles(WIDTH, STRIPS, BLOCK_C)
        if REDUCTION == "statistics":
            columns = tl.minimum(out_width - out_column, WIDTH)  # [STRIPS, 1]
            count += tl.where(strip < strips, rows * columns, 0).to(tl.float32)
        elif MERGES:
            merged = (first // STRIPS).to(tl.int64)
            tl.store(partials_ptr + merged * C + c, tl.sum(total, axis=0), mask=inside)
        elif REDUCTION == "pool":
            tl.store(partials_ptr + strip.to(tl.int64) * C + c[None, :], total, mask=valid)
    if REDUCTION == "statistics":
        safe = tl.maximum(count, 1.0)  # [STRIPS, 1]
        mean = pivot + total / safe  # [STRIPS, BLOCK_C]
        m2 = squares - total * total / safe  # [STRIPS, BLOCK_C]
        # The strips' moments are merged, with means relative to that of the first strip.
        all_count = tl.sum(count)
        weight = count / tl.maximum(all_count, 1.0)  # [STRIPS, 1]
        reference = tl.sum(tl.where(tl.arange(0, STRIPS)[:, None] == 0, mean, 0.0), axis=0)  # [BLOCK_C]
        merged = reference + tl.sum(weight * (mean - reference[None, :]), axis=0)  # [BLOCK_C]
        deviation = mean - merged[None, :]  # [STRIPS, BLOCK_C]
        merged_m2 = tl.sum(m2 + count * deviation * deviation, axis=0)  # [BLOCK_C]
        out = partials_ptr + tl.program_id(0) * 3 * C + c
        tl.store(out, tl.zeros([BLOCK_C], tl.float32) + all_count, mask=inside)
        tl.store(out + C, merged, mask=inside)
        tl.store(out + 2 * C, merged_m2, mask=inside)
