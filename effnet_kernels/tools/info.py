"""The facts that ``effnet info`` prints: versions, devices, which backends can run, and a network's GPU kernels."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from effnet_kernels import __version__, create_model
from effnet_kernels.backends import cpu, select, triton
from effnet_kernels.tools.warmup import launches_of_step


def facts() -> dict[str, dict[str, Any]]:
    """Values by section and name."""

    def version(distribution: str) -> str:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    devices = {"cpu": f"{os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{facts.name}, compute capability {facts.major}.{facts.minor}"
    try:
        native = cpu.describe()
    # EFFNET_KERNELS_ISA may name an instruction set that is not there.
    except ValueError as error:
        native = {"unavailable": str(error)}
    reasons = select.available()
    return {
        "versions": {
            "effnet_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("triton", "pillow", "tqdm", "safetensors")},
            "system": platform.platform(),
        },
        "devices": devices,
        "native extension": native,
        "backends": {name: "available" if why is None else f"unavailable: {why}" for name, why in reasons.items()},
    }


def kernels(model: str, shape: tuple[int, int, int, int]) -> dict[str, list[str]]:
    """The distinct binaries of a float16 training step and of inference: launches are captured, not run.

    Raises BackendError without Triton.
    """
    reason = triton.unavailable_reason()
    if reason is not None:
        raise select.BackendError(reason)
    # It imports Triton.
    from effnet_kernels.backends.triton.compilation import distinct

    network = create_model(model)
    return {
        name: list(map(str, distinct(launches_of_step(network, shape, train, torch.float16))))
        for name, train in (("training step", True), ("inference", False))
    }
