"""Loads of vectors that may be absent, and gradients, sums and moments of tiles."""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import activate_and_differentiate


@triton.jit
def load_vector(ptr, channels, mask, DEFAULT: tl.constexpr):
    """A vector [C] at ``channels`` [BLOCK_C], in fp32; the default everywhere if the vector is None."""
    value = tl.full(channels.shape, DEFAULT, tl.float32)  # [BLOCK_C]
    if ptr is not None:
        value = tl.load(ptr + channels, mask=mask, other=DEFAULT).to(tl.float32)
    return value


@triton.jit
def load_affine(scale_ptr, shift_ptr, mean_ptr, var_ptr, eps, channels, mask):
    """Scale and shift at ``channels``, each [BLOCK_C] in fp32.

    All pointers are to vectors [C] or None, which stands for a scale of one and a shift of zero. With ``mean_ptr`` and
    ``var_ptr``, ``scale_ptr`` and ``shift_ptr`` are BatchNorm's weight and bias, and its normalisation is folded into
    them here.
    """
    scale = tl.full(channels.shape, 1.0, tl.float32)  # [BLOCK_C]
    shift = tl.full(channels.shape, 0.0, tl.float32)  # [BLOCK_C]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channels, mask=mask, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + channels, mask=mask, other=1.0).to(tl.float32)
        scale *= 1.0 / tl.sqrt(var + eps)
        shift -= mean * scale
    return scale, shift


@triton.jit
def load_row(ptr, sample, C, channels, mask, DEFAULT: tl.constexpr):
    """Row ``sample`` of a matrix [N, C] at ``channels`` [BLOCK_C], as :func:`load_vector`."""
    value = tl.full(channels.shape, DEFAULT, tl.float32)  # [BLOCK_C]
    if ptr is not None:
        value = tl.load(ptr + sample.to(tl.int64) * C + channels, mask=mask, other=DEFAULT).to(tl.float32)
    return value


@triton.jit
def load_gradient_vectors(gate_ptr, drop_path_scale_ptr, offset_ptr, scale_ptr, shift_ptr, group, C, channels, inside):
    """The vectors of :func:`gradient_of_norm` at ``channels`` and ``inside`` [BLOCK_C]: four of [BLOCK_C], in fp32.

    gate and offset [G, C] and drop_path_scale [G], read at ``group``, and scale and shift [C]; each may be None.
    Returned are the factor gate * drop_path_scale, then offset, scale and shift.
    """
    factor = load_row(gate_ptr, group, C, channels, inside, 1.0)
    if drop_path_scale_ptr is not None:
        factor *= tl.load(drop_path_scale_ptr + group).to(tl.float32)
    offset = load_row(offset_ptr, group, C, channels, inside, 0.0)
    scale = load_vector(scale_ptr, channels, inside, 1.0)
    shift = load_vector(shift_ptr, channels, inside, 0.0)
    return factor, offset, scale, shift


@triton.jit
def gradient_of_norm(
    grad_ptr, y, offsets, mask, vectors, HAS_FACTOR: tl.constexpr, HAS_OFFSET: tl.constexpr, ACT: tl.constexpr
):
    """dz of :class:`~effnet_kernels.fusion.spec.OutputGradient` on a tile of rows by channels, [BLOCK_M, BLOCK_C].

    grad: a map [R, C], read at ``offsets`` and ``mask`` [BLOCK_M, BLOCK_C], or None for zeros.
    y: the raw output's values, [BLOCK_M, BLOCK_C].
    vectors: those of :func:`load_gradient_vectors`. The first two are left out where there is no such operand: the
        compiler would keep a multiplication by 1 and the addition of 0, which change denormal numbers and -0.
    """
    factor, offset, scale, shift = vectors
    dz = tl.zeros(y.shape, tl.float32)
    if grad_ptr is not None:
        dz = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            dz *= factor[None, :]
    if HAS_OFFSET:
        dz += offset[None, :]
    if ACT != "none":
        _, derivative = activate_and_differentiate(y * scale[None, :] + shift[None, :], ACT)
        dz *= derivative
    return dz


@triton.jit
def output_gradient(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    gate_ptr,
    drop_path_scale_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    group,
    C,
    channels,
    inside,
    offsets,
    mask,
    ACT: tl.constexpr,
):
    """dy of :class:`effnet_kernels.fusion.spec.OutputGradient` on a tile of rows by channels; zero outside of ``mask``.

    Maps: grad and y [R, C], read at ``offsets`` and ``mask`` [BLOCK_ROWS, BLOCK_C].
    Vectors: coefficients [3, C], scale and shift [C], read at ``channels`` and ``inside`` [BLOCK_C].
    By group: gate and offset [G, C], drop_path_scale [G], read at ``group``.
    """
    y = tl.zeros(offsets.shape, tl.float32)  # [BLOCK_ROWS, BLOCK_C]
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    vectors = load_gradient_vectors(
        gate_ptr, drop_path_scale_ptr, offset_ptr, scale_ptr, shift_ptr, group, C, channels, inside
    )
    dy = gradient_of_norm(
        grad_ptr,
        y,
        offsets,
        mask,
        vectors,
        gate_ptr is not None or drop_path_scale_ptr is not None,
        offset_ptr is not None,
        ACT,
    )  # [BLOCK_ROWS, BLOCK_C]
    if coefficients_ptr is not None:
        alpha = load_vector(coefficients_ptr, channels, inside, 0.0)  # [BLOCK_C]
        beta = load_vector(coefficients_ptr + C, channels, inside, 0.0)  # [BLOCK_C]
        gamma = load_vector(coefficients_ptr + 2 * C, channels, inside, 0.0)  # [BLOCK_C]
        dy = alpha[None, :] * dy + (beta[None, :] * y + gamma[None, :])
    return tl.where(mask, dy, 0.0)


@triton.jit
def sum_within_threads(t, SUM_ROWS: tl.constexpr):
    """The sums [SUM_ROWS, BLOCK_C] of every SUM_ROWS-th row of a tile t [BLOCK_M, BLOCK_C].

    With as many rows as all threads of a program hold at once, each thread adds up its own values, and threads need not
    exchange theirs until the last tile.
    """
    return tl.sum(tl.reshape(t, [t.shape[0] // SUM_ROWS, SUM_ROWS, t.shape[1]]), axis=0)


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Count, mean and M2 of the union of two sets (Chan, Golub and LeVeque 1983); either may be empty."""
    count = count_a + count_b
    weight = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * weight, m2_a + m2_b + delta * delta * count_a * weight
