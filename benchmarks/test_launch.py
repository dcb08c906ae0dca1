"""The host's time for a launch, by a cached handle and by Triton itself, on a driver that does nothing.

``pytest benchmarks/ --benchmark-only``; on a GPU the driver's own launch comes on top of both.
"""

import pytest
import torch

from effnet_kernels.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")


@pytest.fixture
def arguments() -> tuple:
    """The kernel, grid, arguments and options of B0's first expand convolution in training."""
    from effnet_kernels.backends.triton.configs import H100, use_target
    from effnet_kernels.backends.triton.launch import capture_launches
    from effnet_kernels.backends.triton.pointwise import pointwise_conv
    from effnet_kernels.fusion.spec import Epilogue, Prologue

    x = torch.randn(1, 16, 16, 16).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(96, 16, 1, 1)
    with capture_launches() as launches, use_target(H100):
        pointwise_conv(x, weight, None, Prologue(), Epilogue(), "statistics")
    (launch,) = launches
    return launch.kernel, launch.grid, launch.arguments | launch.constants, dict(launch.options)


def test_seam(benchmark, arguments) -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton.launch import launcher

    kernel, grid, given, options = arguments
    given |= options
    given["max_registers"] = given.pop("maxnreg", None)
    # The call names its arguments in code, as the package's calls of launchers do, and not in a dictionary.
    names = ", ".join(f"{name}={name}" for name in given)
    call = eval(f"lambda: launch(grid, {names})", given | {"grid": grid, "launch": launcher(kernel)})
    with stub_driver():
        call()
        benchmark(call)


def test_triton(benchmark, arguments) -> None:
    from stub_driver import stub_driver

    kernel, grid, given, options = arguments
    with stub_driver():
        kernel[grid](**given, **options)
        benchmark(lambda: kernel[grid](**given, **options))


def test_block_forward(benchmark) -> None:
    """The host's time for a training block's forward: nine launches, their configurations and allocations."""
    from stub_driver import stub_driver
    from torch import nn

    from effnet_kernels.backends.select import primitives_of
    from effnet_kernels.backends.triton.configs import H100, use_target
    from effnet_kernels.fusion.forward import forward
    from effnet_kernels.modules import MBConvConfig

    config = MBConvConfig(6, 3, 1, 16, 16, 1)
    module = config.block(config, 0.0, nn.BatchNorm2d)
    chain = module.chain_spec().chain
    x = torch.randn(1, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    with stub_driver(), use_target(H100), torch.no_grad():
        benchmark(forward, primitives_of("triton"), chain, x, None)
