"""Events for torch's profiler, which by itself records torch's own operators alone."""

import contextlib

import torch
from torch import Tensor

from effnet_kernels.fusion.geometry import output_map, resolve_padding
from effnet_kernels.fusion.spec import Chain, Padding

Size = tuple[int, ...]


def enabled() -> bool:
    """Whether a profiler is recording."""
    return torch.autograd._profiler_enabled()


def profiled(name: str) -> contextlib.AbstractContextManager[object]:
    """An event of this name, which spans the ``with`` block, where a profiler is recording."""
    return torch.profiler.record_function(f"effnet_kernels::{name}") if enabled() else contextlib.nullcontext()


def record_convolutions(chain: Chain, size: Size, dense: bool) -> Size:
    """Records the convolutions of a chain that reads a map of ``size`` (N, C, H, W), and returns its output's size.

    The profiler counts floating-point operations (``with_flops=True``) for events with the names of torch's operators
    alone. So each convolution is an event ``aten::conv2d`` of no duration; the time is that of the event around them.
    Dense convolutions are left out unless ``dense``.
    """
    for layer in chain.layers:
        samples, channels, height, width = size
        padding = resolve_padding(layer.padding, (height, width), layer.kernel_size, layer.stride)
        if dense or layer.kind != "dense":
            groups = channels if layer.kind == "depthwise" else 1
            record_convolution(size, layer.weight, layer.stride, padding, groups)
        size = (samples, layer.out_channels, *output_map(height, width, layer.kernel_size, layer.stride, padding))
        if layer.excitation is not None:
            for weight in (layer.excitation.reduce_weight, layer.excitation.expand_weight):
                record_convolution((samples, weight.shape[1], 1, 1), weight)
    return (*size[:2], 1, 1) if chain.pool else size


def record_convolution(
    size: Size, weight: Tensor, stride: int = 1, padding: Padding = (0, 0, 0, 0), groups: int = 1
) -> None:
    """Records a convolution of a map of ``size`` (N, C, H, W); see :func:`record_convolutions`."""
    samples, channels, height, width = size
    left, right, top, bottom = padding
    padded = (samples, channels, height + top + bottom, width + left + right)
    x = torch.empty(padded, dtype=weight.dtype, device="meta")
    options = [stride, stride], [0, 0], [1, 1], groups
    event = torch.autograd._record_function_with_args_enter("aten::conv2d", x, weight, None, *options)
    torch.autograd._record_function_with_args_exit(event)
