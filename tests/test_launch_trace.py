"""Launch traces of whole steps on meta tensors: no kernel runs, but every launch at full size is captured."""

import collections

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_kernels as ek
from effnet_kernels.backends import triton
from effnet_kernels.modules import ConvBnAct, FusedMBConvConfig, MBConvConfig

pytestmark = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")

# Operations that return a view.
VIEWS = {
    "view",
    "detach",
    "expand",
    "as_strided",
    "slice",
    "select",
    "alias",
    "unsqueeze",
    "flatten",
    "_unsafe_view",
    "unbind",
    "t",
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


class TorchLaunches(TorchDispatchMode):
    """Counts torch's own operations that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS | ALLOCATIONS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def step(module: nn.Module, x: Tensor, training: bool):
    """Launches and torch's own operations, forward and backward."""
    from effnet_kernels.backends.triton.launch import capture_launches

    module.train(training)
    with capture_launches() as forward, TorchLaunches() as torch_forward, torch.set_grad_enabled(training):
        y = module(x)
    if not training:
        return forward, torch_forward.names
    grad = torch.empty_like(y)
    with capture_launches() as backward, TorchLaunches() as torch_backward:
        y.backward(grad)
    return forward, torch_forward.names, backward, torch_backward.names


def meta_map(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


@pytest.fixture
def mbconv() -> nn.Module:
    config = MBConvConfig(6, 5, 1, 80, 80, 1)
    return config.block(config, 0.2, nn.BatchNorm2d).to("meta")


def test_launches_of_a_training_block(mbconv: nn.Module) -> None:
    x = meta_map(64, 80, 14, 14).requires_grad_()
    forward, torch_forward, backward, torch_backward = step(mbconv, x, training=True)
    assert len(forward) <= 9
    assert len(backward) <= 16
    # Stochastic depth's two draws, and one update of three counters.
    assert sum(torch_forward.values()) <= 3, torch_forward
    assert sum(torch_backward.values()) <= 3, torch_backward


def test_launches_of_an_inference_block(mbconv: nn.Module) -> None:
    launches, others = step(mbconv, meta_map(64, 80, 14, 14), training=False)
    assert len(launches) <= 4
    assert sum(others.values()) <= 3, others


def test_the_head_stores_no_map_at_inference() -> None:
    model = ek.efficientnet_b0().to("meta").half()
    launches, _ = step(model, meta_map(8, 3, 224, 224), training=False)
    head_map = 8 * 7 * 7 * 1280
    shapes = [t.numel() for launch in launches for t in launch.arguments.values() if isinstance(t, Tensor)]
    assert max(shapes) > head_map
    assert head_map not in shapes


def test_a_stem_that_is_recomputed_has_its_statistics_already() -> None:
    stem = ConvBnAct(3, 32, 3, 2).to("meta")
    forward, _, backward, torch_backward = step(stem, meta_map(8, 3, 32, 32, dtype=torch.float32), training=True)
    assert torch_backward["convolution"] == 1
    kernels = [launch.kernel.__name__ for launch in forward], [launch.kernel.__name__ for launch in backward]
    assert "channel_statistics_kernel" in kernels[0]
    assert "channel_statistics_kernel" not in kernels[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_training_step_needs_few_binaries(dtype: torch.dtype) -> None:
    from effnet_kernels.backends.triton.compilation import distinct
    from effnet_kernels.tools.warmup import launches_of_step

    launches = launches_of_step(ek.efficientnet_b0(), (64, 3, 224, 224), True, dtype)
    largest = max((t for t in launches[0].arguments.values() if isinstance(t, Tensor)), key=Tensor.numel)
    assert largest.dtype == dtype
    assert len(distinct(launches)) <= 72


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_of_block_is_captured(dtype: torch.dtype) -> None:
    from effnet_kernels.tools.warmup import launches_of_step

    settings = [
        FusedMBConvConfig(1, 3, 1, 24, 24, 1),
        FusedMBConvConfig(4, 3, 2, 24, 48, 2),
        MBConvConfig(4, 3, 2, 48, 64, 2, padding="same"),
        MBConvConfig(6, 7, 1, 64, 64, 1, squeeze_ratio=None, activation="relu6"),
    ]
    model = ek.EfficientNet(settings, 0.2)
    before = [p.data_ptr() for p in model.parameters()]
    launches = launches_of_step(model, (2, 3, 95, 97), True, dtype)
    assert len(launches) > 50
    assert {t.device.type for launch in launches for t in launch.arguments.values() if isinstance(t, Tensor)} == {
        "meta"
    }
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_step_of_a_shape_that_is_none() -> None:
    from effnet_kernels.tools.warmup import launches_of_step

    with pytest.raises(ValueError, match=r"shape: expected \[N, C, H, W\], got \(3, 224, 224\)"):
        launches_of_step(ek.efficientnet_b0(), (3, 224, 224), True)


def test_no_launch_waits_for_the_host(mbconv: nn.Module) -> None:
    """Nothing in a step reads a value: on meta tensors there is none to read."""
    x = meta_map(2, 80, 14, 14).requires_grad_()
    step(mbconv, x, training=True)
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()


def test_weights_on_another_device_are_refused(mbconv: nn.Module) -> None:
    from effnet_kernels.backends.triton.launch import capture_launches

    config = MBConvConfig(2, 3, 1, 16, 16, 1)
    block = config.block(config, 0.0, nn.BatchNorm2d)
    with (
        capture_launches(),
        pytest.raises(ValueError, match="expected the input on cpu, where the weights are, got meta"),
    ):
        block(meta_map(2, 16, 7, 7, dtype=torch.float32))


@pytest.mark.parametrize("model", ["efficientnet_b0", "efficientnet_b4", "efficientnet_v2_s"])
def test_an_image_takes_few_steps(model: str) -> None:
    """A batch of one leaves an H100 idle, so that its time is that of steps that wait for memory, one after another."""
    import compile_report
    from launch_trace import trace_step

    from effnet_kernels.backends.triton.configs import H100, use_target

    with use_target(H100):
        step = trace_step(model, 1, "fp16", training=False)
    for launch in step.forward.launches:
        if launch.kernel.__name__ not in ("pointwise_conv_kernel", "depthwise_conv_kernel"):
            continue
        outer, inner = compile_report.trips(launch)
        steps, programs = outer * inner, launch.grid[0] * launch.grid[1] * launch.grid[2]
        shape = launch.arguments["x_ptr"].shape
        # Either it fills the multiprocessors, or what is left for each is little.
        assert programs >= 99 or steps <= 15, f"{launch.kernel.__name__} of {shape}: {programs} programs, {steps} steps"


def test_tiles_of_small_batches_fit_the_least_shared_memory() -> None:
    """Weights in float32, as under autocast, take twice the bytes of the maps beside them."""
    from disassembly import SHARED_LIMITS

    from effnet_kernels.backends.triton.compilation import binary_of, compile_for, gpu_target
    from effnet_kernels.backends.triton.configs import Target, use_target
    from effnet_kernels.backends.triton.launch import capture_launches

    model = ek.create_model("efficientnet_b4").to("meta").eval()
    x = torch.empty(4, 3, 380, 380, dtype=torch.float16, device="meta")
    with use_target(Target("cuda", 89, 128)), capture_launches() as launches, torch.no_grad():
        model(x)
    largest = max(
        {binary_of(launch) for launch in launches if launch.kernel.__name__ == "pointwise_conv_kernel"},
        key=lambda binary: _bytes_of_stages(dict(binary.constants), dict(binary.options)),
    )
    assert dict(largest.options)["num_stages"] > 2, largest
    assert compile_for(largest, gpu_target(89)).metadata.shared <= SHARED_LIMITS[89], largest


def _bytes_of_stages(constants: dict, options: dict) -> int:
    return options["num_stages"] * constants["BLOCK_K"] * (2 * constants["BLOCK_M"] + 4 * constants["BLOCK_N"])
