"""One network under several CPU engines: each in a process of its own, asked in turn, and only if they agree.

Thread pools that share a process disturb one another, so that engines timed in one process are not what a user gets.
"""

import gc
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OURS = "effnet_kernels"
# Engines and the module that each needs; those of the network's own package are added.
PEERS = {"torch.compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
# Those that read an exported network.
FROM_ONNX = ("onnxruntime", "openvino")
EAGER = (" channels-last", " contiguous")
# The eager network after `accelerate`, as it was built.
ACCELERATED = " accelerated"
# Steps whose losses have to agree before training is timed.
_STEPS = 4
TOLERANCE = 1e-4


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
    """

    engine: str
    milliseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    memory: float | None = None
    missing: str | None = None


class Comparison(NamedTuple):
    """What :func:`compare` found; printed, it is a table."""

    model: str
    batch: int
    resolution: int
    threads: int
    rows: list[Row]
    training: bool = False

    def fastest_peer(self) -> Row | None:
        timed = [row for row in self.rows if row.milliseconds is not None and not _is_own(row.engine)]
        return min(timed, key=lambda row: row.milliseconds or 0.0, default=None)

    def __str__(self) -> str:
        task = ", training step" if self.training else ""
        lines = [
            f"{self.model} at {self.resolution}, batch {self.batch}, {self.threads} threads, float32{task}",
            f"{'engine':26}{'ms':>10}{'images/s':>10}{'time/ours':>11}{'error':>10}{'MiB':>8}",
        ]
        for row in self.rows:
            if row.milliseconds is None:
                lines.append(f"{row.engine:26}  {row.missing}")
                continue
            ratio = f"{row.ratio:.2f}" if row.ratio else ""
            memory = f"{row.memory:.0f}" if row.memory is not None else ""
            rate = 1e3 * self.batch / row.milliseconds
            lines.append(f"{row.engine:26}{row.milliseconds:10.2f}{rate:10.1f}{ratio:>11}{row.error:10.0e}{memory:>8}")
        return "\n".join(lines)


def engines_of(name: str, training: bool = False) -> tuple[str, ...]:
    """The engines that a network can be compared under, ours first."""
    eager = (OURS, *(_package(name) + state for state in (ACCELERATED, *EAGER)))
    return (*eager, "torch.compile") if training else (*eager, *PEERS)


def compare(
    name: str,
    batch: int = 1,
    resolution: int | None = None,
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    rounds: int = 8,
    training: bool = False,
) -> Comparison:
    """Times a network's inference, or a training step, under several engines on this CPU, in float32.

    Args:
        name: a name of :data:`effnet_kernels.VARIANTS`; the peer is torchvision's network of that name, or timm's.
        batch: images of a call.
        resolution: rows and columns of the images; None for the network's own.
        threads: of each engine; None for torch's number.
        engines: a choice out of :func:`engines_of`; None for all.
        rounds: in each, every engine runs for about a tenth of a second.
        training: whether a call is a step of SGD (forward, loss, backward, update), without dropout and stochastic
            depth, whose draws differ between engines.

    Raises:
        ValueError: for an unknown engine or name.
        Disagreement: where an engine's outputs, or losses, differ by more than 1e-4; nothing is timed then.
        ModuleNotFoundError: without torchvision and timm.
    """
    import numpy as np
    import torch

    from effnet_kernels.models.variants import find_variant

    resolution = find_variant(name).resolution if resolution is None else resolution
    threads = torch.get_num_threads() if threads is None else threads
    known = engines_of(name, training)
    for engine in engines or ():
        if engine not in known:
            raise ValueError(f"engines: expected some of {', '.join(known)}, got {engine!r}")
    chosen = [engine for engine in known if engines is None or engine in engines]
    workers: dict[str, _Worker] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for engine in chosen:
            absent = [module for module in _modules_of(engine) if importlib.util.find_spec(module) is None]
            if absent:
                missing[engine] = f"skipped: {absent[0]} is not installed"
        onnx = any(engine in FROM_ONNX and engine not in missing for engine in chosen)
        expected = _prepare(folder, name, batch, resolution, onnx, training)
        try:
            for engine in chosen:
                if engine in missing:
                    continue
                try:
                    workers[engine] = worker = _Worker(engine, name, folder, threads, training)
                except _WorkerEnded as error:
                    if engine == OURS:
                        raise
                    missing[engine] = f"skipped: {error}"
                    continue
                outputs = np.load(folder / worker.outputs)
                worker.error = float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))
                # Not <=, so that a NaN is caught.
                if not worker.error <= TOLERANCE:
                    raise Disagreement(
                        f"{engine}: expected outputs within {TOLERANCE:.0e} of {_package(name)}'s, got "
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
            medians[engine] / medians[OURS] if OURS in medians else None,
            workers[engine].error,
            workers[engine].memory,
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
    colours = ["#2f6fb0" if _is_own(row.engine) else "#9a9a9a" for row in rows]
    axes.bar_label(axes.barh([row.engine for row in rows], rates, color=colours), fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("images/s")
    axes.set_title(
        f"{comparison.model} at {comparison.resolution}, batch {comparison.batch}, {comparison.threads} threads"
        + (", training step" if comparison.training else "")
    )
    figure.savefig(path)


def _is_own(engine: str) -> bool:
    return engine.endswith((OURS, ACCELERATED))


def _modules_of(engine: str) -> list[str]:
    return [PEERS.get(engine, "torch"), *(["onnx"] if engine in FROM_ONNX else [])]


def _package(name: str) -> str:
    import torchvision

    return "torchvision" if hasattr(torchvision.models, name) else "timm"


def _peer(name: str) -> Any:
    """torchvision's or timm's network of that name, untrained."""
    if _package(name) == "torchvision":
        import torchvision

        return getattr(torchvision.models, name)()
    import timm

    return timm.create_model(name.replace("efficientnet_v2_", "efficientnetv2_"))


def _prepare(folder: Path, name: str, batch: int, resolution: int, onnx: bool, training: bool) -> Any:
    """Writes the network as each engine takes it, and its images; returns the outputs or losses that are right."""
    import numpy as np
    import torch

    from effnet_kernels import freeze

    generator = torch.Generator().manual_seed(0)
    model = _peer(name).eval()
    # Statistics of data, so that activations neither vanish nor grow through an untrained network.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    # Of maps large enough that a variance is no accident.
    size = max(resolution, 128)
    with torch.no_grad():
        model(torch.randn(4, 3, size, size, generator=generator))
    model.eval()
    torch.save(model.state_dict(), folder / "model.pt")
    if not training:
        torch.save(freeze(model), folder / "engine.pt")
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
        step = _training_step(model, model, x)
        return np.asarray([step() for _ in range(_STEPS)])
    with torch.inference_mode():
        return model(x).numpy()


def _training_step(model: Any, compiled: Any, images: Any) -> Callable[[], float]:
    """A step of SGD on fixed images and labels, which returns its loss."""
    import torch

    for module in model.train().modules():
        # Dropout and stochastic depth.
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    target = torch.arange(len(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(compiled(images), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


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
                __spec__.name,
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
        self.memory: float | None = self._answer()
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


def _serve(engine: str, name: str, folder: Path, outputs: str, threads: int, task: str) -> None:
    """The worker's side: the memory once, then for each line of input the seconds of that many calls."""
    import numpy as np

    answers = sys.stdout
    # What engines print is not an answer.
    sys.stdout = sys.stderr
    x = np.load(folder / "x.npy")
    build = _loader(engine, task)(engine, name, folder, x, threads)
    gc.collect()
    before = _resident("VmRSS", reset=True)
    call = build()
    calls = [call() for _ in range(_STEPS)]
    after = _resident("VmHWM")
    np.save(folder / outputs, np.asarray(calls if task == "train" else calls[-1]))
    memory = None if before is None or after is None else (after - before) / 1024
    print(json.dumps(memory), file=answers, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers, flush=True)


Build = Callable[[], Callable[[], Any]]


def _loader(engine: str, task: str) -> Callable[[str, str, Path, Any, int], Build]:
    """What imports an engine and returns the function that builds its call."""
    if task == "train":
        return _load_training
    loaders = {OURS: _load_ours, "onnxruntime": _load_onnxruntime, "openvino": _load_openvino}
    return loaders.get(engine, _load_torch)


def _load_ours(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    import effnet_kernels  # noqa: F401

    torch.set_num_threads(threads)
    image = torch.from_numpy(x)

    def build() -> Callable[[], Any]:
        engine = torch.load(folder / "engine.pt", weights_only=False)
        return lambda: _without_gradients(engine, image)

    return build


def _load_torch(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    _package(name)
    torch.set_num_threads(threads)
    image = torch.from_numpy(x)
    if engine.endswith(EAGER[0]):
        image = image.contiguous(memory_format=torch.channels_last)

    def build() -> Callable[[], Any]:
        model = _peer(name).eval()
        model.load_state_dict(torch.load(folder / "model.pt"))
        if engine.endswith(EAGER[0]):
            model = model.to(memory_format=torch.channels_last)
        if engine.endswith(ACCELERATED):
            from effnet_kernels import accelerate

            accelerate(model)
        if engine == "torch.compile":
            from torch._inductor import config

            config.freezing = True
            model = torch.compile(model)
        return lambda: _without_gradients(model, image)

    return build


def _load_training(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    from effnet_kernels import accelerate, from_peer

    torch.set_num_threads(threads)

    def build() -> Callable[[], Any]:
        model, images = _peer(name), torch.from_numpy(x)
        model.load_state_dict(torch.load(folder / "model.pt"))
        if engine == OURS:
            model = from_peer(model)
        if engine.endswith(ACCELERATED):
            accelerate(model)
        if engine.endswith(EAGER[0]) or engine == "torch.compile":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        return _training_step(model, torch.compile(model) if engine == "torch.compile" else model, images)

    return build


def _without_gradients(model: Any, image: Any) -> Any:
    import torch

    # torch.compile freezes weights under no_grad, in inference mode not in all versions.
    with torch.no_grad():
        return model(image).numpy()


def _load_onnxruntime(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import onnxruntime

    def build() -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})[0]

    return build


def _load_openvino(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import openvino

    def build() -> Callable[[], Any]:
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(core.read_model(str(folder / "model.onnx")), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer({0: x})[compiled.output(0)]

    return build


def _resident(field: str, reset: bool = False) -> int | None:
    """KiB of this process that are in memory, now (VmRSS) or at most since the reset (VmHWM); None where unknown."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except OSError:
        pass
    return None


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
