"""The engines that ``effnet bench`` compares, and the process that runs one of them when it is told to.

python -m effnet_kernels.tools.bench_engines ENGINE NETWORK FOLDER OUTPUTS THREADS TASK
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "effnet_kernels"
OURS_BF16 = "effnet_kernels bfloat16"
# In the precision that it chooses by itself, not the one that it is told.
OPENVINO_DEFAULT = "openvino default"
# Engines and the module that each needs; those of the network's own package are added.
BASELINES = {
    "torch.compile": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    OPENVINO_DEFAULT: "openvino",
}
# Those that read an exported network.
FROM_ONNX = ("onnxruntime", "openvino", OPENVINO_DEFAULT)
EAGER = (" channels-last", " contiguous")
# The eager network after `accelerate`, as it was built.
ACCELERATED = " accelerated"
FLOAT32 = "float32"
# Steps whose losses have to agree before training is timed.
STEPS = 4


def is_own(engine: str) -> bool:
    return engine in (OURS, OURS_BF16) or engine.endswith(ACCELERATED)


def modules_of(engine: str) -> list[str]:
    return [BASELINES.get(engine, "torch"), *(["onnx"] if engine in FROM_ONNX else [])]


def package_of(name: str) -> str:
    import torchvision

    return "torchvision" if hasattr(torchvision.models, name) else "timm"


def eager_network(name: str) -> Any:
    """torchvision's or timm's network of that name, untrained."""
    if package_of(name) == "torchvision":
        import torchvision

        return getattr(torchvision.models, name)()
    import timm

    return timm.create_model(name.replace("efficientnet_v2_", "efficientnetv2_"))


def training_step(model: Any, compiled: Any, images: Any) -> Callable[[], float]:
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


def _serve(engine: str, name: str, folder: Path, outputs: str, threads: int, task: str) -> None:
    """The worker's side: dtype and memory once, then for each line of input the seconds of that many calls."""
    import numpy as np

    answers = sys.stdout
    # Engines print there, too, which is no answer.
    sys.stdout = sys.stderr
    x = np.load(folder / "x.npy")
    build = _loader(engine, task)(engine, name, folder, x, threads)
    gc.collect()
    before = _resident("VmRSS", reset=True)
    dtype, call = build()
    calls = [call() for _ in range(STEPS)]
    after = _resident("VmHWM")
    np.save(folder / outputs, np.asarray(calls if task == "train" else calls[-1]))
    memory = None if before is None or after is None else (after - before) / 1024
    print(json.dumps([dtype, memory]), file=answers, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers, flush=True)


# Makes an engine: what it computes in, and its call.
Build = Callable[[], tuple[str, Callable[[], Any]]]


def _loader(engine: str, task: str) -> Callable[[str, str, Path, Any, int], Build]:
    """The function that imports an engine and returns another, which builds its call."""
    if task == "train":
        return _load_training
    if engine in (OURS, OURS_BF16):
        return _load_ours
    if engine in FROM_ONNX:
        return _load_onnxruntime if engine == "onnxruntime" else _load_openvino
    return _load_torch


def _load_ours(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    import effnet_kernels  # noqa: F401

    torch.set_num_threads(threads)
    image = torch.from_numpy(x)

    def build() -> tuple[str, Callable[[], Any]]:
        frozen = torch.load(folder / f"{engine}.pt", weights_only=False)
        dtype = str(frozen.folded.weight.dtype).removeprefix("torch.")
        return dtype, lambda: _without_gradients(frozen, image)

    return build


def _load_torch(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    package_of(name)
    torch.set_num_threads(threads)
    image = torch.from_numpy(x)
    if engine.endswith(EAGER[0]):
        image = image.contiguous(memory_format=torch.channels_last)

    def build() -> tuple[str, Callable[[], Any]]:
        model = eager_network(name).eval()
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
        return FLOAT32, lambda: _without_gradients(model, image)

    return build


def _load_training(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import torch

    from effnet_kernels import accelerate, from_peer

    torch.set_num_threads(threads)

    def build() -> tuple[str, Callable[[], Any]]:
        model, images = eager_network(name), torch.from_numpy(x)
        model.load_state_dict(torch.load(folder / "model.pt"))
        if engine == OURS:
            model = from_peer(model)
        if engine.endswith(ACCELERATED):
            accelerate(model)
        if engine.endswith(EAGER[0]) or engine == "torch.compile":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        compiled = torch.compile(model) if engine == "torch.compile" else model
        return FLOAT32, training_step(model, compiled, images)

    return build


def _without_gradients(model: Any, image: Any) -> Any:
    import torch

    # torch.compile freezes weights under no_grad, in inference mode not in all versions.
    with torch.no_grad():
        return model(image).numpy()


def _load_onnxruntime(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import onnxruntime

    def build() -> tuple[str, Callable[[], Any]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return FLOAT32, lambda: session.run(None, {"x": x})[0]

    return build


def _load_openvino(engine: str, name: str, folder: Path, x: Any, threads: int) -> Build:
    import openvino

    def build() -> tuple[str, Callable[[], Any]]:
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if engine != OPENVINO_DEFAULT:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core.compile_model(core.read_model(str(folder / "model.onnx")), "CPU", settings)
        request = compiled.create_infer_request()
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        dtype = {"f32": FLOAT32, "bf16": "bfloat16", "f16": "float16"}.get(chosen, chosen)
        return dtype, lambda: request.infer({0: x})[compiled.output(0)]

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
