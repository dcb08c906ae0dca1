"""The kernel of :mod:`effnet_kernels.backends.triton.bn_act_add`."""

import triton
import triton.language as tl

from effnet_kernels.backends.triton.kernels.activation import activate
from effnet_kernels.backends.triton.kernels.tiles import load_affine, load_row


@triton.jit(do_not_specialize=["rows", "c_quotient"])
def bn_act_add_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    drop_path_scale_ptr,
    residual_ptr,
    out_ptr,
    rows,
    c_quotient,
    eps,
    ACT: tl.constexpr,
    C_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = drop_path_scale * act(scale * x + shift) * gate + residual.

    R = G * rows: G groups of ``rows`` rows (pixels), the samples if a factor is by sample, else the whole batch.

    Maps: x, residual and out [R, C].
    Vectors: scale, shift, mean and var [C], see :func:`load_affine`; gate [G, C], drop_path_scale [G].
    """
    C = c_quotient * C_DIVISOR
    group = tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = channels < C
    scale, shift = load_affine(scale_ptr, shift_ptr, mean_ptr, var_ptr, eps, channels, inside)  # [BLOCK_C]
    factor = load_row(gate_ptr, group, C, channels, inside, 1.0)  # [BLOCK_C]
    if drop_path_scale_ptr is not None:
        factor *= tl.load(drop_path_scale_ptr + group).to(tl.float32)
    base = group.to(tl.int64) * rows
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK_M
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (start + row < rows)[:, None] & inside[None, :]  # [BLOCK_M, BLOCK_C]
        offsets = (base + start) * C + (row[:, None] * C + channels[None, :])  # [BLOCK_M, BLOCK_C]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        y = activate(x * scale[None, :] + shift[None, :], ACT) * factor[None, :]  # [BLOCK_M, BLOCK_C]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
