"""Several processes: SyncBatchNorm against BatchNorm on the joined batch, and parallel training against one process."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, randomize
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.modules import ConvBnAct, FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

# Images of each process: as many, and less.
SHARDS = {2: (3, 2), 3: (2, 4, 1)}


class Case(NamedTuple):
    """A network whose BatchNorms are synchronised, and the size of its images."""

    make: Callable[[], nn.Module]
    channels: int = 8
    size: int = 6
    backend: str = "cpu"
    traced: bool = False
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm


def mbconv(stride: int = 1, **norm: Any) -> nn.Module:
    config = MBConvConfig(4, 3, stride, 8, 8, 1)
    return MBConv(config, 0.0, lambda channels: nn.BatchNorm2d(channels, **norm))


def timm_block() -> nn.Module:
    import timm

    return ek.accelerate(timm.create_model("efficientnet_b0").blocks[2][1])


def convert_timm(block: nn.Module) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(block)


CASES = {
    "mbconv": Case(mbconv, traced=True),
    "strided": Case(lambda: mbconv(2), size=7),
    "one value of a channel in each process": Case(lambda: mbconv(2), size=1),
    "fused": Case(lambda: FusedMBConv(FusedMBConvConfig(4, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d)),
    "stem": Case(lambda: ConvBnAct(8, 12, 3, 2)),
    "cumulative": Case(lambda: mbconv(momentum=None), traced=True),
    "no running statistics": Case(lambda: mbconv(track_running_stats=False)),
    "no weights": Case(lambda: mbconv(affine=False)),
    "reference": Case(mbconv, backend="reference"),
    "timm": Case(timm_block, 40, traced=True, convert=convert_timm),
}


def network_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return randomize(case.make()).train()


def images_of(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """Images, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, case.channels, case.size, case.size, generator=generator)
    with torch.no_grad():
        shape = copy.deepcopy(network_of(case)).eval()(x).shape
    return x, torch.randn(shape, generator=generator)


def result(network: nn.Module, x: Tensor, grad: Tensor, steps: int = 2) -> dict[str, Any]:
    """Outputs, gradients and buffers after a few steps."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        network.zero_grad()
        out = network(x)
        out.backward(grad)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {
        "out": out.detach(),
        "x": x.grad,
        "gradients": gradients,
        "buffers": {name: b.clone() for name, b in network.named_buffers()},
    }


def run_cases(folder: Path) -> None:
    """What each process does: every case on its shard of the batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    begin = sum(SHARDS[world][:rank])
    shard = slice(begin, begin + SHARDS[world][rank])
    found = {}
    for name, case in CASES.items():
        network = case.convert(network_of(case))
        x, grad = images_of(case, sum(SHARDS[world]))
        with ek.use_backend(case.backend):  # type: ignore[arg-type]
            found[name] = result(network, x[shard], grad[shard])
            # Without gradients too, and traced.
            with torch.no_grad():
                found[name]["no_grad"] = network(x[shard])
            if case.traced:
                torch.compiler.reset()
                traced = case.convert(network_of(case))
                traced.compile(backend="aot_eager", fullgraph=True)
                found[name]["traced"] = result(traced, x[shard], grad[shard])
            found[name]["eval"] = network.eval()(x[shard])
    # A group that has two of the processes; the third's batches are its own.
    groups = [dist.new_group([0, 1]), dist.new_group([world - 1])]
    network = network_of(CASES["mbconv"])
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network, groups[0] if rank < 2 else groups[1])
    x, grad = images_of(CASES["mbconv"], sum(SHARDS[world]))
    found["group"] = result(network, x[shard], grad[shard])
    torch.save(found, folder / f"{rank}.pt")


def launch(function: str, processes: int, folder: Path, *arguments: str, timeout: float = 300) -> None:
    """Runs a function of this file in so many processes, which find one another through a file."""
    code = (
        "import sys, torch; from pathlib import Path; import test_distributed as t; torch.set_num_threads(1)\n"
        "folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "t.dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)\n"
        f"t.{function}(folder, *sys.argv[4:])\n"
        "t.dist.destroy_process_group()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    running = [
        subprocess.Popen([*command, str(rank), str(processes), *arguments], env=environment, stderr=subprocess.PIPE)
        for rank in range(processes)
    ]
    for process in running:
        _, error = process.communicate(timeout=timeout)
        assert process.returncode == 0, error.decode()[-3000:]


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every process found, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    launch("run_cases", request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """The processes' shards together are the whole batch, and their running statistics those of the whole."""
    for name in ("out", "x"):
        assert_close(torch.cat([rank[name] for rank in ranks]), expected[name])
    largest = max((float(g.abs().max()) for g in expected["gradients"].values()), default=0.0)
    for name, gradient in expected["gradients"].items():
        total = sum(rank["gradients"][name] for rank in ranks)
        assert ((total - gradient).abs() <= 1e-5 * (gradient.abs() + largest)).all(), name
    for rank in ranks:
        for name, buffer in expected["buffers"].items():
            assert ((rank["buffers"][name] - buffer).abs() <= 1e-5 * buffer.abs().clamp_min(0.1)).all(), name


@pytest.mark.parametrize("name", CASES)
def test_synchronised_norms_are_those_of_the_joined_batch(name: str, found: list[dict[str, Any]]) -> None:
    case = CASES[name]
    x, grad = images_of(case, sum(SHARDS[len(found)]))
    with ek.use_backend(case.backend):  # type: ignore[arg-type]
        network = network_of(case)
        assert {row.backend for row in ek.explain(network, x) if row.backend != "torch"} == {case.backend}
        expected = result(network, x, grad)
        with torch.no_grad():
            once_more = network(x)
        inference = network.eval()(x)
    ranks = [rank[name] for rank in found]
    assert_same(ranks, expected)
    if case.traced:
        assert_same([rank["traced"] for rank in ranks], expected)
    assert_close(torch.cat([rank["no_grad"] for rank in ranks]), once_more)
    if name != "no running statistics":
        assert_close(torch.cat([rank["eval"] for rank in ranks]), inference)


def test_a_process_group_joins_its_own_processes(found: list[dict[str, Any]]) -> None:
    case, shards = CASES["mbconv"], SHARDS[len(found)]
    x, grad = images_of(case, sum(shards))
    together = shards[0] + shards[1]
    assert_same([rank["group"] for rank in found[:2]], result(network_of(case), x[:together], grad[:together]))
    for rank in found[2:]:
        assert_same([rank["group"]], result(network_of(case), x[together:], grad[together:]))
