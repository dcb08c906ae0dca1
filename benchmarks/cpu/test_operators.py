"""The native operators over the layers of B0 in training, batch 16: GFLOP/s, and shares of what this machine can do.

``of peak`` is of the multiply-adds that registers alone allow, ``of copy`` the maps that a call has to read and write
once, over the time that copying as much takes; both are measured in the same run. Whichever is higher tells what
bounds a layer.
"""

import functools
import statistics
import time

import pytest
import shapes
import torch
from torch import Tensor

from effnet_kernels.backends import cpu
from effnet_kernels.fusion.spec import Epilogue, OutputGradient, Prologue

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")

BATCH = 16
LAYERS = [*shapes.pointwise_layers("efficientnet_b0", 224), *shapes.depthwise_layers("efficientnet_b0", 224)]


def name_of(layer) -> str:
    if isinstance(layer, shapes.Pointwise):
        return f"{layer.inputs}-{layer.outputs} at {layer.size}"
    return f"depthwise {layer.channels} at {layer.size}, k{layer.kernel}s{layer.stride}"


@functools.cache
def peak() -> float:
    return cpu.fma_peak()


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, those read and those written, of torch's copy of a map too large for any cache."""
    source = torch.ones(32 * 1024 * 1024)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 8 * source.numel() / statistics.median(seconds)


def channels_last(channels: int, size: int) -> Tensor:
    return torch.randn(BATCH, channels, size, size).contiguous(memory_format=torch.channels_last)


def calls(layer):
    """Forward and backward as a block makes them, with the multiplications and the bytes of maps of each."""
    from effnet_kernels.backends.cpu import primitives

    pointwise = isinstance(layer, shapes.Pointwise)
    channels = layer.inputs if pointwise else layer.channels
    outputs = layer.outputs if pointwise else layer.channels
    out_size = layer.size if pointwise else -(-layer.size // layer.stride)
    expands = pointwise and outputs > channels
    x, y = channels_last(channels, layer.size), channels_last(outputs, out_size)
    gradient = OutputGradient(channels_last(outputs, out_size), y, torch.randn(3, outputs))
    # An expansion reads an activated map, the others what a convolution left.
    prologue = Prologue() if expands else Prologue(torch.rand(channels), torch.randn(channels), "silu")
    mean = None if expands else torch.zeros(channels)
    read, written = 4 * x.numel(), 4 * y.numel()
    if pointwise:
        weight = torch.randn(outputs, channels, 1, 1)
        if not expands:
            prologue = prologue._replace(gate=torch.rand(BATCH, channels))
        forward = functools.partial(primitives.pointwise_conv, x, weight, None, prologue, Epilogue(), "statistics")
        backward = functools.partial(
            primitives.pointwise_conv_backward, gradient, weight, x, prologue, mean, None, False, True, True
        )
    else:
        weight, pads = torch.randn(channels, 1, layer.kernel, layer.kernel), (layer.kernel // 2,) * 4
        forward = functools.partial(
            primitives.depthwise_conv, x, weight, layer.stride, pads, prologue, Epilogue(), "statistics"
        )
        backward = functools.partial(
            primitives.depthwise_conv_backward, gradient, x, weight, layer.stride, pads, prologue, mean, None
        )
    work = 2 * BATCH * layer.macs()
    return {"forward": (forward, work, read + written), "backward": (backward, 2 * work, 2 * (read + written))}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_operator(benchmark, layer, direction: str) -> None:
    call, work, moved = calls(layer)[direction]
    benchmark.group = f"native operators, {direction}, batch {BATCH}"
    benchmark.pedantic(call, rounds=12, warmup_rounds=2)
    seconds = benchmark.stats["median"]
    benchmark.extra_info.update(
        {
            "GFLOP/s": round(1e-9 * work / seconds, 1),
            "of peak": round(work / seconds / peak(), 3),
            "of copy": round(moved / seconds / copy_bandwidth(), 3),
        }
    )
