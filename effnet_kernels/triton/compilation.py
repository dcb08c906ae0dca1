"""What the compiler makes of recorded launches: which binaries they need, and what each costs, for any GPU.

Nothing here needs a GPU: Triton compiles for a target that is not there, and the disassemblers in its wheel read the
result.
"""

import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from effnet_kernels.triton.launch import Launch

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
# Shared memory that a block may ask for, in bytes, by compute capability (CUDA's programming guide, table of technical
# specifications) and on AMD's CDNA3 and RDNA3.
SHARED_LIMITS: dict[int | str, int] = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}


class Binary(NamedTuple):
    """What makes two launches need two compilations."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        given = " ".join(f"{name}={value}" for name, value in self.constants if value is not None)
        absent = " ".join(name.removesuffix("_ptr") for name, value in self.constants if value is None)
        dtypes = sorted({kind[1:] for _, kind in self.signature if kind.startswith("*")})
        without = f" without {absent}" if absent else ""
        return f"{self.kernel.__name__} {'/'.join(dtypes)} {given}{without} warps={self.num_warps}"


def binary_of(launch: Launch) -> Binary:
    """The binary of a launch whose tensors are aligned to 16 bytes, as torch's allocators make them."""
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    for name, argument in launch.arguments.items():
        if argument is None:
            signature.append((name, "constexpr"))
            constants.append((name, None))
        elif isinstance(argument, Tensor):
            signature.append((name, _TYPES[argument.dtype]))
        elif isinstance(argument, int):
            signature.append((name, "i32" if -(2**31) <= argument < 2**31 else "i64"))
        else:
            signature.append((name, "fp32"))
    signature += [(name, "constexpr") for name in launch.constants]
    constants += launch.constants.items()
    order = {name: index for index, name in enumerate(launch.kernel.arg_names)}
    return Binary(
        launch.kernel,
        tuple(sorted(signature, key=lambda entry: order[entry[0]])),
        tuple(sorted(constants, key=lambda entry: order[entry[0]])),
        launch.num_warps,
        launch.num_stages,
    )


def distinct(launches: Iterable[Launch]) -> list[Binary]:
    """The binaries that the launches need, in order of first use."""
    return list(dict.fromkeys(binary_of(launch) for launch in launches))


def gpu_target(architecture: int | str) -> GPUTarget:
    """Triton's target of a compute capability (90) or an AMD architecture ("gfx942")."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def compile_for(binary: Binary, target: GPUTarget) -> Any:
    """Triton's compiled kernel for a target that need not be here."""
    names = [name for name, _ in binary.signature]
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        binary.kernel,
        signature=dict(binary.signature),
        constexprs={(names.index(name),): value for name, value in binary.constants},
        attrs={(names.index(name),): aligned for name, kind in binary.signature if kind.startswith("*")},
    )
    options = {"num_warps": binary.num_warps, "num_stages": binary.num_stages}
    return triton.compile(source, target=target, options=options)


def compile_in_parallel(binaries: list[Binary], target: GPUTarget, processes: int | None = None) -> None:
    """Fills Triton's cache with the binaries, so that a later launch finds them there."""
    tasks = [(_name(binary.kernel), binary[1:], tuple(target.__dict__.values())) for binary in binaries]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(tasks), processes or os.cpu_count() or 1)) as pool:
        pool.starmap(_compile_named, tasks, chunksize=1)


def _name(kernel: JITFunction) -> tuple[str, str]:
    return kernel.fn.__module__, kernel.fn.__name__


def _compile_named(name: tuple[str, str], rest: tuple[Any, ...], target: tuple[Any, ...]) -> None:
    kernel = getattr(__import__(name[0], fromlist=[name[1]]), name[1])
    compile_for(Binary(kernel, *rest), GPUTarget(*target))


class Resources(NamedTuple):
    """What a binary takes of a multiprocessor, and what its code looks like."""

    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a block
    instructions: int  # of the code, each counted once
    narrowest_access: int  # bits of the narrowest load or store of device memory


def resources(compiled: Any, architecture: int | str) -> Resources:
    if isinstance(architecture, int):
        return _nvidia_resources(compiled)
    return _amd_resources(compiled)


def _nvidia_resources(compiled: Any) -> Resources:
    usage, assembly = _disassemble(compiled.asm["cubin"])
    register, stack, local = (
        int(match.group(1)) if (match := re.search(rf"{name}:(\d+)", usage)) else 0
        for name in ("REG", "STACK", "LOCAL")
    )
    code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.M)
    accesses = [op for op in code if re.match(r"(LDG|STG|LDGSTS)\b", op)]
    widths = [int(match.group(1)) if (match := re.search(r"\.(?:[US])?(8|16|64|128)\b", op)) else 32 for op in accesses]
    executed = [op for op in code if op != "NOP"]
    return Resources(register, stack + local, compiled.metadata.shared, len(executed), min(widths, default=0))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run_tool("cuobjdump", "--dump-resource-usage", str(path))
        return usage, _run_tool("nvdisasm", "-c", str(path))


@functools.cache
def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"expected {name} in Triton's wheel at {path}")
    return str(path)


def _run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(match.group(1)) if match else 0

    code = re.findall(r"^\t([a-z]\w+)", assembly, re.M)
    accesses = [op for op in code if re.match(r"(global|buffer)_(load|store)_", op)]
    suffixes = {"x4": 128, "b128": 128, "x3": 96, "x2": 64, "b64": 64, "dword": 32, "b32": 32, "short": 16, "b16": 16}
    widths = [next((bits for suffix, bits in suffixes.items() if suffix in op), 8) for op in accesses]
    spills = 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count"))
    return Resources(metadata("vgpr_count"), spills, compiled.metadata.shared, len(code), min(widths, default=0))
