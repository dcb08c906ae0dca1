"""Depthwise convolution, BatchNorm, SiLU and pooled mean of each B0 layer: the native kernel and torch's four passes.

``pytest benchmarks/ --benchmark-only``; a number is taken only after both agree. Medians of one process tell layers
apart; ``effnet_kernels`` against the baselines as whole networks is timed with a process for each.
"""

import pytest
import shapes
import torch
import torch.nn.functional as F

from effnet_kernels import ops
from effnet_kernels.backends import cpu
from effnet_kernels.fusion.spec import Epilogue

LAYERS = shapes.depthwise_layers("efficientnet_b0", 224)


def torch_depthwise(x, weight, layer, scale, shift):
    y = F.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2, groups=layer.channels)
    y = F.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)
    y = F.silu(y, inplace=True)
    return y, y.mean(dim=(2, 3))


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda d: f"c{d.channels}-{d.size}-k{d.kernel}s{d.stride}")
def test_depthwise_conv(benchmark, layer, engine):
    if cpu.unavailable_reason() is not None:
        pytest.skip(f"the native extension is missing: {cpu.unavailable_reason()}")
    x = torch.randn(1, layer.channels, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(layer.channels, 1, layer.kernel, layer.kernel)
    scale, shift = torch.rand(layer.channels) + 0.5, torch.randn(layer.channels)
    epilogue = Epilogue(scale, shift, "silu")

    def native():
        return ops.depthwise_conv(x, weight, layer.stride, layer.kernel // 2, None, epilogue, "pool")

    with torch.inference_mode():
        for ours, theirs in zip(native(), torch_depthwise(x, weight, layer, scale, shift), strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        if engine == "native":
            benchmark(native)
        else:
            benchmark(torch_depthwise, x, weight, layer, scale, shift)
    benchmark.extra_info["GFLOP/s"] = 2e-9 * layer.macs() / benchmark.stats["median"]
