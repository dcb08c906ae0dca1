"""The native CPU kernels: whether they are there, which instruction set they use, and the checked calls into them.

Importing this costs nothing and never fails; the extension is loaded at the first use.
"""

from effnet_kernels.backends.cpu.extension import (
    NativeExtensionWarning,
    describe,
    fma_peak,
    isa,
    supported_isas,
    unavailable_reason,
    warn_if_unavailable,
)
from effnet_kernels.backends.cpu.memory import check_bf16, release_memory, runs_bf16, use_isa

__all__ = [
    "NativeExtensionWarning",
    "check_bf16",
    "describe",
    "fma_peak",
    "isa",
    "release_memory",
    "runs_bf16",
    "supported_isas",
    "unavailable_reason",
    "use_isa",
    "warn_if_unavailable",
]
