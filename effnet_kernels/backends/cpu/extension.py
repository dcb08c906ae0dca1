"""Loads the extension once and says why when it cannot."""

import functools
import importlib
import importlib.util
import struct
import warnings
from pathlib import Path
from typing import Any

# The extension shares torch's threads, so torch has to be in the process first.
import torch

# The number in csrc/bindings.cpp: an extension of another interface would misread arguments, or lack functions.
INTERFACE = 8
FAILURE_FILE = Path(__file__).parents[2] / "_native_build_failure.txt"


class NativeExtensionWarning(UserWarning):
    """The compiled CPU kernels are missing, so CPU tensors run plain PyTorch."""


@functools.cache
def load() -> tuple[Any, str | None]:
    """The extension module and None, or None and the reason."""
    try:
        found = importlib.util.find_spec("effnet_kernels._native")
        if found is not None and found.origin is not None and _is_truncated(Path(found.origin)):
            return None, f"{found.origin} is truncated: install effnet_kernels again"
        module = importlib.import_module("effnet_kernels._native")
        interface = getattr(module, "interface", None)
        if interface != INTERFACE:
            return None, (
                f"{module.__file__} is of another version, with interface {interface} where {INTERFACE} is expected: "
                "install effnet_kernels again"
            )
        return module, None
    except ImportError as error:
        if FAILURE_FILE.exists():
            built = FAILURE_FILE.read_text(encoding="utf-8", errors="replace").strip()
            return None, f"the native extension was not built when effnet_kernels was installed:\n{built}"
        if isinstance(error, ModuleNotFoundError):
            folder = Path(__file__).parents[2]
            return None, f"no native extension in {folder}: a source tree that was not built (pip install -e .)?"
        return None, f"the native extension cannot be imported: {error}"


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file of 64 bits ends before the table at its end, which would crash the loader."""
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):
        # Another system's, or nothing that a loader takes for a library.
        return len(header) < 64
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    size, number = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size < offset + size * number


def extension() -> Any:
    """The extension module; RuntimeError with the reason where there is none."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"effnet_kernels has no CPU kernels here: {reason}")
    return module


def unavailable_reason() -> str | None:
    """None where the extension can be used, otherwise why it cannot."""
    return load()[1]


@functools.cache
def warn_if_unavailable() -> None:
    """Warns, once in a process, where the extension is missing."""
    reason = unavailable_reason()
    if reason is not None:
        warnings.warn(
            f"CPU tensors run plain PyTorch: {reason}",
            NativeExtensionWarning,
            stacklevel=2,
        )


def fma_peak(bf16: bool = False) -> float:
    """Floating-point operations a second of multiply-adds in registers, on torch's number of threads; measured now."""
    return float(extension().fma_peak(torch.get_num_threads(), bf16))


def isa() -> str:
    """The instruction set in use. ValueError if ``EFFNET_KERNELS_ISA`` names one that cannot run here."""
    return extension().selected_isa()


def supported_isas() -> list[str]:
    """The instruction sets that this build contains and this machine supports, the preferred one last."""
    return extension().supported_isas()


@functools.cache
def has_bf16(isa: str) -> bool:
    """Whether an instruction set has kernels for networks in bfloat16."""
    return any(row["isa"] == isa and row["bf16"] for row in extension().kernels())


def describe() -> dict[str, object]:
    """For ``effnet info``: ``isa``, ``supported_isas``, ``bfloat16``, and ``threads``, whose library is shared."""
    reason = unavailable_reason()
    if reason is not None:
        return {"unavailable": reason}
    return {
        "isa": isa(),
        "supported_isas": supported_isas(),
        "bfloat16": "yes" if has_bf16(isa()) else "no: frozen networks compute in float32",
        "threads": extension().thread_runtime(),
    }
