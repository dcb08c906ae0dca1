"""Several processes: SyncBatchNorm against BatchNorm on the joined batch, and parallel training against one process."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import TRACES_OPERATORS, assert_close, importing_alike, randomize
from torch import Tensor, nn
from training_cases import last_checkpoint, save_colours

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
            if case.traced and TRACES_OPERATORS:
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
    leaf, network = x[shard].requires_grad_(), CASES["mbconv"].convert(network_of(CASES["mbconv"]))
    with pytest.raises(RuntimeError, match="whose BatchNorm is synchronised has no second derivative"):
        torch.autograd.grad(network(leaf).sum(), leaf, create_graph=True)
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
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(processes), *arguments], stderr=subprocess.PIPE, **importing_alike(folder)
        )
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
    if case.traced and TRACES_OPERATORS:
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


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(ek.efficientnet_lite0(num_classes=3, stochastic_depth_prob=0.0, dropout=0.0)).train()


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 3, 32, 32, generator=generator), torch.randint(0, 3, (3,), generator=generator)


def loss_of(network: nn.Module, rank: int) -> Tensor:
    x, labels = batch_of(rank)
    return nn.functional.cross_entropy(network(x), labels)


def run_parallel(folder: Path) -> None:
    """What each process does: a step under DistributedDataParallel and one with sharded parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from effnet_kernels.modules import fused_module

    rank, world = dist.get_rank(), dist.get_world_size()
    network = small_network()
    wrapped = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped, rank).backward()
    found = {"ddp": {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}}

    network = small_network()
    mesh = init_device_mesh("cpu", (world,))
    for part in (*network.features, network):
        fully_shard(part, mesh=mesh)
    chains = []
    run = fused_module.autograd.run
    fused_module.autograd.run = lambda *arguments: (chains.append(arguments[0]), run(*arguments))[1]
    loss_of(network, rank).backward()
    found["fsdp"] = {name: p.grad.full_tensor() for name, p in network.named_parameters() if p.grad is not None}
    # The blocks stay on the kernels: their parameters are whole when they are called.
    assert chains == ["cpu"] * 18, chains
    torch.save(found, folder / f"{rank}.pt")


def test_parallel_gradients_are_the_mean_of_the_processes(tmp_path: Path) -> None:
    launch("run_parallel", 2, tmp_path)
    network = small_network()
    for _ in range(2):
        network.zero_grad()
        torch.stack([loss_of(network, rank) for rank in range(2)]).mean().backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for rank in range(2):
        for kind, gradients in torch.load(tmp_path / f"{rank}.pt").items():
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                difference = (gradients[name] - gradient).abs()
                assert (difference <= 1e-4 * (gradient.abs() + 1e-1 * largest)).all(), (kind, name)


def test_a_killed_worker_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Under torchrun's elastic launch; the weights are those of a run that was not disturbed.

    Where each process holds a part of the parameters, too, up to the order of sums.
    """
    pytest.importorskip("lightning", reason="the extra train is not installed")
    (tmp_path / "colours").mkdir()
    folder = save_colours(tmp_path / "colours")
    settings = ["data.image_size=16", "data.workers=0", "data.held_out=0.25", "training.save_steps=1"]
    settings += ["augmentation.mixup=0.2", "network.freeze_epochs=1", "optimizer.name=sgd", "optimizer.lr=0.001"]
    arguments = ["train", "--data", str(folder), "--recipe", "cifar", "--model", "efficientnet_lite0"]
    arguments += ["--batch-size", "2", "--epochs", "4", *(word for value in settings for word in ("--set", value))]
    # A worker of the first attempt ends without a word in its fifth step.
    worker = (
        "import os, signal, sys, torch; from effnet_kernels.tools.cli import main\n"
        "from effnet_kernels.train.module import ImageClassifier\n"
        "step = ImageClassifier.training_step\n"
        "def dying(module, batch, index):\n"
        "    if module.global_step == 4 and os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(module, batch, index)\n"
        "if sys.argv[1] == 'disturbed': ImageClassifier.training_step = dying\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    (tmp_path / "worker.py").write_text(worker)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sharded = ["--set", "training.strategy=fsdp", "--set", "training.ema=0"]
    for name, kind, others in (("whole", "", []), ("disturbed", "disturbed", []), ("sharded", "disturbed", sharded)):
        output = ["--output", str(tmp_path / name), "--resume", "auto", *others]
        command = [*launcher, "--max-restarts=1", str(tmp_path / "worker.py"), kind, *arguments, *output]
        # Otherwise torch 2.14 keeps one store for both attempts, in which a worker may find the address of a dead one.
        options = importing_alike(tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("best validation accuracy") == 1
        assert kind == "" or "exitcode:-9" in done.stderr.replace(" ", "")
    whole, disturbed, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "disturbed", "sharded"))
    assert whole["global_step"] == disturbed["global_step"] == parts["global_step"] == 8
    assert len(whole["random"]) == 2
    for state in ("state_dict", "current_model_state"):
        assert all(torch.equal(disturbed[state][name], value) for name, value in whole[state].items())
    for name, value in whole["current_model_state"].items():
        assert ((parts["state_dict"][name] - value).abs() <= 5e-4 * (value.abs().max() + 1e-3)).all(), name
