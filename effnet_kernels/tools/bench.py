"""One network under several CPU engines: each in a process of its own, asked in turn, and only if they agree.

Thread pools that share a process disturb one another, so that times in one process are not those that a user gets.
"""

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effnet_kernels.backends import cpu
from effnet_kernels.tools import bench_engines
from effnet_kernels.tools.bench_engines import (
    ACCELERATED,
    BASELINES,
    EAGER,
    FLOAT32,
    FROM_ONNX,
    OURS,
    OURS_BF16,
    STEPS,
    eager_network,
    is_own,
    modules_of,
    package_of,
    training_step,
)

# Of outputs, by what an engine computes in.
TOLERANCES = {FLOAT32: 1e-4, "bfloat16": 0.1, "float16": 0.1}


class Disagreement(ValueError):
    """An engine's outputs are not those of the network, so that its speed means nothing."""


class Row(NamedTuple):
    """An engine's result.

    Attributes:
        milliseconds: of a batch, the median; None where the engine did not run.
        ratio: its time over ours.
        error: root mean square of the difference from the eager network's outputs, over theirs.
        memory: MiB that building the engine and running it added to its process at most; None where it is unknown.
        missing: why the engine did not run.
        dtype: what the engine computes in.
    """

    engine: str
    milliseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    memory: float | None = None
    missing: str | None = None
    dtype: str | None = None


class Comparison(NamedTuple):
    """The result of :func:`compare`; printed, it is a table."""

    model: str
    batch: int
    resolution: int
    threads: int
    rows: list[Row]
    training: bool = False

    def __str__(self) -> str:
        task = ", training step" if self.training else ""
        lines = [
            f"{self.model} at {self.resolution}, batch {self.batch}, {self.threads} threads{task}",
            f"{'engine':26}{'dtype':9}{'ms':>10}{'images/s':>10}{'time/ours':>11}{'error':>10}{'MiB':>8}",
        ]
        for row in self.rows:
            if row.milliseconds is None:
                lines.append(f"{row.engine:26}  {row.missing}")
                continue
            ratio = f"{row.ratio:.2f}" if row.ratio else ""
            memory = f"{row.memory:.0f}" if row.memory is not None else ""
            rate = 1e3 * self.batch / row.milliseconds
            lines.append(
                f"{row.engine:26}{row.dtype:9}{row.milliseconds:10.2f}{rate:10.1f}{ratio:>11}{row.error:10.0e}{memory:>8}"
            )
        return "\n".join(lines)


def engines_of(name: str, training: bool = False) -> tuple[str, ...]:
    """The engines that a network can be compared under, ours first."""
    eager = tuple(package_of(name) + state for state in (ACCELERATED, *EAGER))
    return (OURS, *eager, "torch.compile") if training else (OURS, OURS_BF16, *eager, *BASELINES)


def compare(
    name: str,
    batch: int = 1,
    resolution: int | None = None,
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    rounds: int = 8,
    training: bool = False,
    dtype: str = FLOAT32,
) -> Comparison:
    """Times a network's inference, or a training step, under several engines on this CPU.

    They compute in float32, but for our engine in bfloat16 and for OpenVINO in the precision that it takes by itself.

    Args:
        name: a name of :data:`effnet_kernels.VARIANTS`; the baseline is torchvision's network of that name, or timm's.
        batch: images of a call.
        resolution: rows and columns of the images; None for the network's own.
        threads: of each engine; None for torch's number.
        engines: a choice out of :func:`engines_of`; None for all.
        rounds: in each, every engine runs for about a tenth of a second.
        training: whether a call is a step of SGD (forward, loss, backward, update), without dropout and stochastic
            depth, whose draws differ between engines.
        dtype: of the engine of ours that ratios are of: float32, or for inference bfloat16.

    Raises:
        ValueError: for an unknown engine or name, and for bfloat16 where this machine has no instructions for it.
        Disagreement: where an engine's outputs, or losses, differ by more than 1e-4, or 0.1 of a 16-bit engine;
            nothing is timed then.
        ModuleNotFoundError: without torchvision and timm.
    """
    import numpy as np
    import torch

    from effnet_kernels.models.variants import find_variant

    resolution = find_variant(name).resolution if resolution is None else resolution
    threads = torch.get_num_threads() if threads is None else threads
    known = engines_of(name, training)
    ours = {FLOAT32: OURS, "bfloat16": OURS_BF16}.get(dtype, "")
    if ours not in known:
        expected = " or ".join([FLOAT32] if training else [FLOAT32, "bfloat16"])
        raise ValueError(f"dtype: expected {expected}, got {dtype!r}")
    if ours == OURS_BF16:
        cpu.check_bf16()
    for engine in engines or ():
        if engine not in known:
            raise ValueError(f"engines: expected some of {', '.join(known)}, got {engine!r}")
    chosen = [engine for engine in known if engines is None or engine in engines]
    workers: dict[str, _Worker] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for engine in chosen:
            absent = [module for module in modules_of(engine) if importlib.util.find_spec(module) is None]
            if absent:
                missing[engine] = f"skipped: {absent[0]} is not installed"
            if engine == OURS_BF16 and not cpu.runs_bf16():
                missing[engine] = "skipped: the instruction set in use does not multiply in bfloat16"
        onnx = any(engine in FROM_ONNX and engine not in missing for engine in chosen)
        expected = _prepare(folder, name, batch, resolution, onnx, training)
        try:
            for engine in chosen:
                if engine in missing:
                    continue
                try:
                    workers[engine] = worker = _Worker(engine, name, folder, threads, training)
                except _WorkerEnded as error:
                    if engine == ours:
                        raise
                    missing[engine] = f"skipped: {error}"
                    continue
                outputs = np.load(folder / worker.outputs)
                worker.error = float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))
                tolerance = TOLERANCES[worker.dtype]
                # Not >, so that a NaN is caught.
                if not worker.error <= tolerance:
                    raise Disagreement(
                        f"{engine}: expected outputs within {tolerance:.0e} of {package_of(name)}'s, got "
                        f"{worker.error:.1e}; no speed is printed"
                    )
            for _ in range(rounds):
                for worker in workers.values():
                    worker.run()
                    time.sleep(0.05)
        finally:
            for worker in workers.values():
                worker.stop()
    medians = {engine: 1e3 * statistics.median(worker.seconds) for engine, worker in workers.items()}
    rows = [
        Row(engine, missing=missing[engine])
        if engine in missing
        else Row(
            engine,
            medians[engine],
            medians[engine] / medians[ours] if ours in medians else None,
            workers[engine].error,
            workers[engine].memory,
            dtype=workers[engine].dtype,
        )
        for engine in chosen
    ]
    return Comparison(name, batch, resolution, threads, rows, training)


def plot(comparison: Comparison, path: str | Path) -> None:
    """Draws images a second as bars. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if row.milliseconds][::-1]
    rates = [1e3 * comparison.batch / (row.milliseconds or 1.0) for row in rows]
    figure = Figure(figsize=(8, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["#2f6fb0" if is_own(row.engine) else "#9a9a9a" for row in rows]
    axes.bar_label(axes.barh([row.engine for row in rows], rates, color=colours), fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("images/s")
    axes.set_title(
        f"{comparison.model} at {comparison.resolution}, batch {comparison.batch}, {comparison.threads} threads"
        + (", training step" if comparison.training else "")
    )
    figure.savefig(path)


def _prepare(folder: Path, name: str, batch: int, resolution: int, onnx: bool, training: bool) -> Any:
    """Writes the network as each engine takes it, and its images; returns the right outputs or losses."""
    import numpy as np
    import torch

    from effnet_kernels import freeze

    generator = torch.Generator().manual_seed(0)
    model = eager_network(name).eval()
    # Statistics of data, so that activations neither vanish nor grow through an untrained network.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    # From images large enough that the last maps have many pixels for a variance.
    size = max(resolution, 128)
    with torch.no_grad():
        model(torch.randn(4, 3, size, size, generator=generator))
    model.eval()
    torch.save(model.state_dict(), folder / "model.pt")
    if not training:
        torch.save(freeze(model), folder / f"{OURS}.pt")
        if cpu.runs_bf16():
            torch.save(freeze(model, dtype=torch.bfloat16, verify=False), folder / f"{OURS_BF16}.pt")
    x = torch.randn(batch, 3, resolution, resolution, generator=generator)
    np.save(folder / "x.npy", x.numpy())
    if onnx:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (x,),
                str(folder / "model.onnx"),
                input_names=["x"],
                output_names=["y"],
                dynamo=False,
                opset_version=17,
            )
    if training:
        step = training_step(model, model, x)
        return np.asarray([step() for _ in range(STEPS)])
    with torch.inference_mode():
        return model(x).numpy()


class _WorkerEnded(RuntimeError):
    """An engine's process is gone."""


class _Worker:
    """A process that runs one engine when it is told to."""

    def __init__(self, engine: str, name: str, folder: Path, threads: int, training: bool) -> None:
        self.engine = engine
        self.outputs = f"{engine.replace(' ', '-')}.npy"
        self.error = 0.0
        self.seconds: list[float] = []
        # The worker imports the package that runs here, whatever the current folder holds.
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                bench_engines.__name__,
                engine,
                name,
                str(folder),
                self.outputs,
                str(threads),
                "train" if training else "infer",
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.dtype: str
        self.memory: float | None
        self.dtype, self.memory = self._answer()
        # The calls of a tenth of a second.
        self._ask(1)
        self._calls = max(1, int(0.1 / self._answer()[0]))

    def run(self) -> None:
        # The first call after another process had the caches is not counted.
        self._ask(self._calls + 1)
        self.seconds += self._answer()[1:]

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, calls: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _WorkerEnded(f"{self.engine} ended with status {self._process.wait()}; its message is above")
        return json.loads(line)
