"""What only a GPU can show, of which the tests under a simulator know nothing: streams, threads, graphs, sizes.

    pytest benchmarks/gpu_smoke.py [-p pytest_results --results FILE]

Where a GPU is stood in for (``without_gpu.py``) graphs replay nothing, and what they write is not compared.
"""

import copy
import os
import threading
from collections.abc import Callable

import gpu_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.backends import select

STOOD_IN = "EFFNET_WITHOUT_GPU" in os.environ
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def _exact_float32(request: pytest.FixtureRequest):
    """torch computes convolutions in TF32 by default, in which only one of the tests is to run."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = "default_settings" in request.node.name
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return gpu_cases.network("efficientnet_b0", toy=True)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return gpu_cases.image(8, 3, 64)


def gradients(model: nn.Module, x: Tensor, backend: select.Backend = "triton") -> list[Tensor]:
    """Of a copy, so that running statistics stay; on the current stream."""
    model = copy.deepcopy(model).train()
    with select.use_backend(backend):
        loss = model(x).float().square().mean()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, of all values together."""
    one, other = (torch.cat([t.detach().double().flatten() for t in side]) for side in (actual, expected))
    return float((one - other).norm() / other.norm())


def test_training_in_float32(model: nn.Module, x: Tensor) -> None:
    exact = gradients(copy.deepcopy(model).double(), x.double(), "torch")
    assert error(gradients(model, x), exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    exact = gradients(copy.deepcopy(model).double(), x.double(), "torch")
    with gpu_cases.autocast(dtype):
        eager, ours = error(gradients(model, x, "torch"), exact), error(gradients(model, x), exact)
    assert ours < 2 * eager + torch.finfo(dtype).eps


def test_two_runs_have_the_same_bits(model: nn.Module, x: Tensor) -> None:
    assert all(map(torch.equal, gradients(model, x), gradients(model, x)))


def test_kernels_follow_the_stream(model: nn.Module, x: Tensor) -> None:
    """On another stream than the current one, kernels would read x before the sleeping stream has written it."""
    expected = gradients(model, x)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = gradients(model, late)
    torch.cuda.synchronize()
    assert error(found, expected) == 0


def test_threads_share_the_kernels(model: nn.Module, x: Tensor) -> None:
    expected, found = gradients(model, x), []
    # A stand-in's tensors are the host's in another thread.
    backend: select.Backend = "torch" if STOOD_IN else "triton"

    def work(own: nn.Module) -> None:
        found.append(gradients(own, x, backend))

    threads = [threading.Thread(target=work, args=(copy.deepcopy(model),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error(each, expected) < 1e-5 for each in found] == [True] * 4


def test_freezing_under_default_settings(model: nn.Module) -> None:
    """freeze() compares the engine with the model, both with TF32 where torch allows it."""
    ek.freeze(model.eval(), dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_frozen_network_replays_its_graphs(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    eager, graphed = (ek.freeze(model.eval(), dtype=dtype, cuda_graph=graph) for graph in (False, True))
    for images in (x, x[:2, :, :48], x + 1):
        images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        y = graphed(images)
        assert STOOD_IN or torch.equal(y, eager(images))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = graphed(images)
    torch.cuda.synchronize()
    assert STOOD_IN or torch.equal(y, eager(images))


def test_a_training_step_as_a_graph(model: nn.Module, x: Tensor) -> None:
    """Replayed on other images than it was captured with."""
    reference = copy.deepcopy(model)
    step = training_step(model, x)
    replay = gpu_cases.graphed(step)
    x.copy_(torch.randn_like(x))
    replay()
    torch.cuda.synchronize()
    training_step(reference, x)()
    grads = [[p.grad for p in m.parameters()] for m in (model, reference)]
    assert STOOD_IN or error(*grads) < 1e-2


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    labels = torch.arange(len(x), device="cuda")
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with gpu_cases.autocast(torch.float16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()

    return step


def test_losses_with_a_grad_scaler(model: nn.Module, x: Tensor) -> None:
    """Eight steps of SGD in float16 against the eager path."""
    losses: dict[str, list[float]] = {}
    labels = torch.arange(len(x), device="cuda")
    for backend in ("triton", "torch"):
        own, losses[backend] = copy.deepcopy(model).train(), []
        optimizer = torch.optim.SGD(own.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda", enabled=not STOOD_IN)
        for _ in range(8):
            optimizer.zero_grad()
            with select.use_backend(backend), gpu_cases.autocast(torch.float16):
                loss = F.cross_entropy(own(x).float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[backend].append(float(loss))
    assert losses["triton"] == pytest.approx(losses["torch"], rel=0.05)


def test_maps_of_more_than_2_to_the_31_elements(model: nn.Module) -> None:
    """The last images of a batch whose largest map has more elements than 32 bits count, against the same alone."""
    x = gpu_cases.image(4 if STOOD_IN else 2**31 // (16 * 128**2) + 8, 8, 128, torch.float16)
    # The second block expands its input to 16 channels.
    block = model.features[2].eval().half()
    with torch.no_grad():
        # Another batch may be summed in another order.
        assert error([block(x)[-4:]], [block(x[-4:])]) < 5e-3


def test_torch_compile(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model).train()
    torch.compile(compiled, fullgraph=True)(x).float().square().mean().backward()
    assert error([p.grad for p in compiled.parameters() if p.grad is not None], expected) < 1e-3


@pytest.mark.skipif(STOOD_IN, reason="NCCL needs a GPU")
def test_distributed_data_parallel(model: nn.Module, x: Tensor, tmp_path) -> None:
    """In one process: hooks, buckets, strides of gradients."""
    expected = gradients(model, x)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train(), device_ids=[0], gradient_as_bucket_view=True)
        wrapped(x).float().square().mean().backward()
        assert error([p.grad for p in model.parameters()], expected) < 1e-5
    finally:
        torch.distributed.destroy_process_group()
