"""The host's time for a launch and for whole passes, on drivers that do nothing.

``pytest benchmarks/ --benchmark-only``; on a GPU the driver's own launches come on top.
"""

import shutil

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


@pytest.fixture(scope="session")
def null_driver(tmp_path_factory):
    from stub_driver import NullDriver

    if torch.cuda.is_available():
        pytest.skip("the driver of this machine's GPU is loaded, beside which there can be no null driver")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler, with which Triton builds its launchers")
    return NullDriver(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("launched_by", ["extension", "Triton"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_b0(benchmark, monkeypatch, null_driver, training: bool, launched_by: str) -> None:
    """The host's time for a pass of B0 by its launch plans: 363 launches forward and backward, or 66 at inference.

    The stem's convolution and the classifier are torch's and run on the CPU, on a small image.
    """
    from stub_driver import models_on

    import effnet_kernels as ek
    from effnet_kernels.backends.triton import plan_launches

    model = ek.create_model("efficientnet_b0", num_classes=8).train(training)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
            if training:
                model.zero_grad()
                y.sum().backward()

    # What the memory held is computed with, and subnormal numbers take long.
    flushed = torch.set_flush_denormal(True)
    with models_on(null_driver):
        if launched_by == "Triton":
            monkeypatch.setattr(plan_launches, "driver_functions", lambda: None)
        # Compiled, recorded, repeated.
        for _ in range(3):
            step()
        benchmark.pedantic(step, rounds=100)
    if flushed:
        torch.set_flush_denormal(False)
