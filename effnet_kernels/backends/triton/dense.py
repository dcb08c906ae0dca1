"""Dense convolutions on a GPU: torch's own, with kernels for statistics and for the output's gradient."""

from torch import Tensor

from effnet_kernels.backends import dense
from effnet_kernels.backends.triton import batch_norm
from effnet_kernels.fusion.spec import OutputGradient, Padding, Reduction


def dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """x [N, C, H, W], weight [K, C, k, k], bias [K] to y [N, K, H', W'], and partial statistics [P, 3, K] of it."""
    y = dense.conv(x, weight, bias, stride, padding)
    return y, batch_norm.channel_statistics(y) if reduction == "statistics" else None


def dense_conv_backward(
    gradient: OutputGradient,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    residual: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, plus the gradient ``residual``, and of the weight."""
    if not (needs_input or needs_weight):
        return None, None
    dy = batch_norm.apply_gradient(gradient, None)
    return dense.conv_backward(dy, x, weight, stride, padding, residual, needs_input, needs_weight)
