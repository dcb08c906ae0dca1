"""Depthwise convolution, BatchNorm and SiLU as one differentiable function."""

from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import has_depthwise
from effnet_kernels.backends.batch_norm import check_batch
from effnet_kernels.backends.operands import as_contiguous
from effnet_kernels.fusion import autograd
from effnet_kernels.fusion.geometry import resolve_padding
from effnet_kernels.fusion.spec import ACTIVATIONS, Activation, BatchNorm, Chain, Epilogue, Layer, Padding, Prologue
from effnet_kernels.ops.bn_act_add import bn_act_add
from effnet_kernels.ops.checks import check_choice, check_map, check_shape, check_tensor, fits_kernels
from effnet_kernels.ops.depthwise_conv import depthwise_conv
from effnet_kernels.ops.finalize_batch_norm import finalize_batch_norm


def depthwise_conv_bn_silu(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int = 1,
    padding: int | Padding | str = 0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Activation = "silu",
    skip_nonfinite_statistics: bool = False,
) -> Tensor:
    """``silu(batch_norm(depthwise_conv(x)))``, differentiable in x, weight, norm_weight and norm_bias.

    In training the convolution emits its statistics as it stores its raw output, which is all that backward keeps
    beside the input; at inference the three are one pass. Where the device has kernels, both directions run on
    those of this package's blocks.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 by the reference); channels-last is fastest.
        weight: [C, 1, k, k], k odd (kernels: 3, 5, 7). With maps of lower precision it may be float32.
        norm_weight, norm_bias: [C], BatchNorm's weight and bias; None for one and zero.
        running_mean, running_var: [C]. In training they are moved in place by ``momentum`` towards the batch's mean
            and unbiased variance; at inference BatchNorm normalises by them. None, in training only, leaves them out.
        stride: 1 or 2 in kernels.
        padding: an integer, (left, right, top, bottom), or ``"same"`` (TensorFlow's).
        training: whether to normalise by the batch's statistics.
        momentum, eps: as ``torch.nn.functional.batch_norm`` has them.
        act: another activation in SiLU's place: "none", "relu", "relu6", "hardswish".
        skip_nonfinite_statistics: whether the running statistics of a channel stay as they are where those of the batch
            are not finite, for training with a gradient scaler. torch's batch_norm writes them.

    Returns:
        [N, C, H', W'] in x's dtype, in channels-last strides where a kernel ran.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit, or one value a channel in training.

    Source: Howard et al. 2017 (MobileNets), section 3.1; Ioffe and Szegedy 2015, algorithms 1 and 2.
    """
    check_map(x)
    check_choice(act, ACTIVATIONS, "act")
    check_tensor(weight, "weight", "[C, 1, k, k]")
    channels, kernel = x.shape[1], weight.shape[-1]
    check_shape(weight, (channels, 1, kernel, kernel), "weight", x)
    named = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    named.update(running_mean=running_mean, running_var=running_var)
    for name, vector in named.items():
        check_shape(vector, (channels,), name, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var together, got one of them")
    if not training and running_mean is None:
        raise ValueError("expected running_mean and running_var with training=False, got None")
    pads = resolve_padding(padding, (x.shape[2], x.shape[3]), kernel, stride)
    vectors = (weight, norm_weight, norm_bias, running_mean, running_var)
    backend = select.operator_backend(x) if fits_kernels(x, None, None, *vectors) else "reference"
    if backend != "reference" and has_depthwise(backend, kernel, stride):
        norm = BatchNorm(
            None if norm_weight is None else as_contiguous(norm_weight),
            None if norm_bias is None else as_contiguous(norm_bias),
            running_mean,
            running_var,
            None,
            eps,
            momentum,
            batch_statistics=training,
            tracks=training,
            skip_nonfinite=skip_nonfinite_statistics,
        )
        layer = Layer("depthwise", as_contiguous(weight), None, stride, pads, norm, act)
        # Unlike a block's, an operator's output has the dtype of x under autocast.
        with select.without_autocast(x):
            return autograd.run(backend, Chain((layer,)), x, None)
    if not training:
        scale, shift = finalize_batch_norm(None, norm_weight, norm_bias, running_mean, running_var, eps=eps)
        return depthwise_conv(x, weight, stride, pads, epilogue=Epilogue(scale, shift, act))[0]
    y, stats = depthwise_conv(x, weight, stride, pads, reduction="statistics")
    check_batch(y.shape)
    scale, shift = finalize_batch_norm(
        stats, norm_weight, norm_bias, running_mean, running_var, momentum, eps, skip_nonfinite_statistics
    )
    return bn_act_add(y, Prologue(scale, shift, act))
