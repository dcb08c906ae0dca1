"""The resources and the instructions of a compiled kernel, read from its disassembly.

The disassemblers are those in Triton's wheel; no GPU is needed.
"""

import collections
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

from effnet_kernels.backends.triton.compilation import Binary, compile_for, gpu_target

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
# Kinds of work that have a unit of their own in a multiprocessor, by the first part of the instruction's name.
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "FMNMX", "F2FP"}
_LOADS = {"LDG": "global", "LDGSTS": "global", "STG": "global", "LDS": "shared", "STS": "shared", "LDSM": "shared"}


class Code(NamedTuple):
    """A binary's resources and instructions.

    Attributes:
        spills: bytes of local (AMD: scratch) memory a thread.
        shared: bytes a block.
        access: bytes a thread moves at once in its narrowest access to a map, 0 where it moves none.
        access_warp: the same for the threads of a warp that access neighbours.
        depths: instructions a warp executes outside of loops, in each trip of an outer loop and in each of an inner
            one, by kind: "issued", "fma", "special", and "global" and "shared" in bytes a thread. None on AMD.
    """

    registers: int
    spills: int
    shared: int
    access: int
    access_warp: int
    depths: tuple[collections.Counter[str], ...] | None


def disassemble(binary: Binary, architecture: int | str) -> Code:
    """Compiles for an architecture, 90 or "gfx942"."""
    compiled = compile_for(binary, gpu_target(architecture))
    dtype = next((kind[1:] for name, kind in binary.signature if kind in ("*fp16", "*bf16")), "fp32")
    access = _map_access(compiled.asm["ttgir"], dtype.replace("fp", "f"))
    if isinstance(architecture, str):
        registers, spills = _amd_registers(compiled.asm["amdgcn"])
        return Code(registers, spills, compiled.metadata.shared, *access, None)
    usage, assembly = _nvidia_disassembly(compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    # A stack frame that no instruction touches is no spill.
    spills = stack + local if re.search(r"\b(STL|LDL)\b", assembly) else 0
    return Code(registers, spills, compiled.metadata.shared, *access, _instructions_by_depth(assembly))


def _map_access(ttgir: str, dtype: str) -> tuple[int, int]:
    """Bytes of the narrowest access to a tile of a map, a thread and a warp.

    A map's tile has two dimensions and the maps' dtype; weights, whose tiles can be smaller than a warp's widest
    access, are known by their name in the kernels.
    """
    layout = r"#ttg.blocked<{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\]"
    aliases = {
        name: (sizes, threads) for name, sizes, threads in re.findall(rf"^(#blocked\d*) = {layout}", ttgir, re.M)
    }
    found = []
    for line in ttgir.splitlines():
        # The layout has a name, or stands there itself in the compiler's other way to print.
        match = re.search(rf"tensor<\d+x(\d+)x(?:!tt\.ptr<{dtype}>|{dtype}), (?:(#blocked\d*)>|{layout})", line)
        if (
            match
            and re.search(r"tt\.load|tt\.store|async_copy_global_to_local|buffer_(load|store)", line)
            and "%weight_" not in line
        ):
            columns, alias, *inline = match.groups()
            sizes, threads = (int(text.split(", ")[1]) for text in (aliases[alias] if alias else inline))
            element = 4 if dtype == "f32" else 2
            found.append((sizes * element, min(int(columns), sizes * threads) * element))
    return min(found, default=(0, 0))


def _instructions_by_depth(assembly: str) -> tuple[collections.Counter[str], ...]:
    """Instructions by how many loops enclose them; a loop is the code between a label and a branch back to it."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    code: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            pending.append(match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            code.append((address, match[2]))
    ends: dict[int, int] = {}
    for address, text in code:
        match = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if match and labels[match[1]] < address:
            ends[labels[match[1]]] = max(address, ends.get(labels[match[1]], 0))
    depths = tuple(collections.Counter() for _ in range(3))
    for address, text in code:
        name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        depth = min(2, sum(start <= address <= end for start, end in ends.items()))
        kind, *flags = name.split(".")
        if kind == "NOP":
            continue
        depths[depth]["issued"] += 1
        if kind in _FMA:
            depths[depth]["fma"] += 1
        elif kind == "MUFU":
            depths[depth]["special"] += 1
        elif kind in _LOADS:
            bits = next((int(flag) for flag in flags if flag in ("64", "128")), 32)
            bits = next((int(flag[1:]) for flag in flags if flag in ("U8", "S8", "U16", "S16")), bits)
            depths[depth][_LOADS[kind]] += 16 if kind == "LDSM" else bits // 8
    return depths


def _nvidia_disassembly(cubin: bytes) -> tuple[str, str]:
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


def _amd_registers(assembly: str) -> tuple[int, int]:
    def metadata(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    # Scalars that do not fit go to lanes of vector registers, which is cheap. A spill is scratch memory.
    return metadata("vgpr_count"), metadata("private_segment_fixed_size")
