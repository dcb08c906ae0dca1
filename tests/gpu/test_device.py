"""What only a GPU has: streams, graphs, threads of autograd, huge maps and several devices.

The expected results are those of the same kernels outside of the special situation: whether they are right is the other
files' business.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_gradients_close, randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_kernels import EfficientNet
from effnet_kernels.backends import select
from effnet_kernels.backends.triton import launch
from effnet_kernels.modules import ConvBnAct, FusedMBConvConfig, MBConvConfig
from effnet_kernels.tools.timing import graphed
from gpu.compare import assert_accurate, channels_last

pytestmark = pytest.mark.skipif(launch.simulated(), reason="a simulator has no streams, graphs or device memory")


def network() -> EfficientNet:
    """A stem, a fused block, a block with squeeze-and-excitation and a head."""
    settings = [FusedMBConvConfig(2, 3, 1, 8, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2)]
    return randomize(EfficientNet(settings, 0.0, stochastic_depth_prob=0.0, num_classes=5)).cuda()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """One forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), torch.arange(x.shape[0], device=x.device) % 5)
    loss.backward()
    return loss.detach()


def assert_same_step(model: nn.Module, other: nn.Module) -> None:
    """Bit for bit, as the kernels repeat themselves; torch's dense convolutions do so in one thread and one layout."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_side_stream() -> None:
    model, x = network(), channels_last(4, 3, 64, 64)
    other = copy.deepcopy(model)
    expected = step(other, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work that a kernel on another stream would overtake.
        torch.cuda._sleep(20_000_000)
        x = x * 1.0
        loss = step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected)
    assert_same_step(model, other)


def test_two_threads() -> None:
    models = [network() for _ in range(2)]
    images = [channels_last(4, 3, 64, 64 + 8 * index) for index in range(2)]
    expected = [copy.deepcopy(model) for model in models]
    for model, x in zip(expected, images, strict=True):
        for _ in range(5):
            step(model, x)

    def run(model: nn.Module, x: Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                step(model, x)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, model, x) for model, x in zip(models, images, strict=True)]:
            future.result()
    for model, other in zip(models, expected, strict=True):
        assert_gradients_close(model, other)


def test_a_thread_that_has_not_used_the_device_yet() -> None:
    """It has no current context, which a plan's launches need."""
    model, x = network().eval(), channels_last(4, 3, 64, 64)
    with torch.no_grad():
        *_, expected = (model(x) for _ in range(3))
    torch.cuda.synchronize()

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(run).result()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_captured_training_step(dtype: torch.dtype | None) -> None:
    model, x = network(), channels_last(4, 3, 64, 64)
    eager = copy.deepcopy(model)
    labels = torch.arange(4, device="cuda")

    def made(network: nn.Module) -> tuple[Callable[[], None], Tensor]:
        """A step, and the loss that it writes."""
        optimizer, written = (
            torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9),
            torch.zeros((), device="cuda"),
        )

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
                loss = F.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            written.copy_(loss.detach())

        return run, written

    run, loss = made(model)
    replay = graphed(run)
    eagerly, expected = made(eager)
    # As many steps as come before the capture.
    for _ in range(3):
        eagerly()
    for _ in range(3):
        replay()
        eagerly()
        assert loss.item() == expected.item()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(p, q)


def test_a_first_launch_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network().eval(), channels_last(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        # Launchers hold the dictionary itself; as a patched item it gets its entries back.
        for key in list(launch._handles):
            monkeypatch.delitem(launch._handles, key)
        with (
            pytest.raises(RuntimeError, match="first launch before a CUDA graph is captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training: bool) -> None:
    model, x = network().train(training), channels_last(2, 3, 64, 64)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    if training:
        assert torch.allclose(step(compiled, x), step(eager, x), rtol=1e-4)
        assert_gradients_close(model, eager)
    else:
        with torch.no_grad():
            assert_accurate(compiled(x), eager(x).double())


def test_a_recomputed_block_runs_on_the_forced_backend() -> None:
    """The recomputation runs in autograd's thread of the GPU."""
    layer, x = randomize(ConvBnAct(8, 16, 1)).cuda(), channels_last(2, 8, 9, 7).requires_grad_()
    chosen: list[str] = []
    layer.register_forward_pre_hook(lambda module, inputs: chosen.append(layer.choose(inputs[0]).backend))
    for backend in ("torch", "triton"):
        with select.use_backend(backend):
            checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert chosen == ["torch", "torch", "triton", "triton"]


def test_saved_tensors_in_pinned_memory() -> None:
    model, x = network(), channels_last(2, 3, 64, 64)
    other = copy.deepcopy(model)
    step(other, x)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        step(model, x)
    # What is saved loses its strides, for which torch computes its dense convolutions in another way.
    assert_gradients_close(model, other)


def test_ddp(tmp_path: Path) -> None:
    model, x = network(), channels_last(4, 3, 64, 64)
    other = copy.deepcopy(model)
    step(other, x)
    torch.distributed.init_process_group(
        "nccl" if torch.distributed.is_nccl_available() else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True)
        step(parallel, x)
        assert_same_step(model, other)
    finally:
        torch.distributed.destroy_process_group()


def test_grad_scaler() -> None:
    """A step that overflows is skipped, and the others are those of float32 within float16's precision."""
    model, x, labels = network(), channels_last(8, 3, 64, 64), torch.arange(8, device="cuda") % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() < 2.0**24
    assert losses[-1] < losses[0]


def test_maps_beyond_2_31_elements() -> None:
    """The last images of a batch whose maps need 64-bit offsets are those of a small batch."""
    samples, gigabyte = 5600, 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * gigabyte:
        pytest.skip(f"wants 40 GiB of free device memory, got {free / gigabyte:.0f}")
    config = MBConvConfig(1, 3, 1, 32, 16, 1)
    block = randomize(config.block(config, 0.0, nn.BatchNorm2d)).eval().cuda()
    x = torch.empty(samples, 32, 112, 112, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[:] = channels_last(8, 32, 112, 112, dtype=torch.float16).repeat(samples // 8, 1, 1, 1)
    with torch.no_grad(), select.use_backend("triton"):
        assert torch.equal(block(x)[-8:], block(x[-8:].contiguous(memory_format=torch.channels_last)))
        statistics = copy.deepcopy(block).train()
        small = copy.deepcopy(statistics)
        y, expected = statistics(x)[-8:], small(x[-8:].contiguous(memory_format=torch.channels_last))
    assert_accurate(y.float(), expected.double(), expected)


def test_several_gpus() -> None:
    """Tensors on a GPU that is not the current one; the current one stays as it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("wants two GPUs")
    model, x = network(), channels_last(4, 3, 64, 64)
    other = copy.deepcopy(model).to("cuda:1")
    step(model, x)
    step(other, x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad.to(p.device))
    with pytest.raises(ValueError, match="expected the input on cuda:1"):
        other(x)
