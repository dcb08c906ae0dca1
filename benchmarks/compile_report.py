"""The compiler's output for every kernel at every layer of the networks, for GPUs that this machine need not have.

    python benchmarks/compile_report.py [--targets sm_90,gfx942] [--models ...] [--subset] [--json FILE]

The launches of whole steps are captured on meta tensors of full size, with each target's launch configurations, in
training and at inference, at batches of 1, 64 and 256. Every distinct binary is compiled and disassembled: registers,
spills, shared memory and the width of accesses to maps. The script fails where a binary does not compile, spills more
than ``SPILLS`` allows (on NVIDIA's and on AMD's data center targets), exceeds the target's shared memory, or where a
pointwise convolution reads or writes maps in less than 16 bytes a thread.

For an H100 the script also estimates, launch by launch, how near the code can come to the limit of device memory, and
whether enough loads are in flight to reach it. This is a model, not a measurement. "bound" is the time to move each
tensor once at 3.35 TB/s over the longest of that and the times that the SM's units need for the instructions of the
disassembly, weighted with the trips of the loops that enclose them, all programs spread evenly over 132 SMs at 1.755
GHz with perfect overlap: 4 instructions, 128 FMA, 16 special functions, 128 bytes of L1 and 128 of shared memory a
clock; matrix instructions 989 TFLOP/s in 16 bits, 494 with TF32. Beside it stand figures that the model leaves out:
programs in the grid, the steps of a program one after the other (trips of its innermost loop), waves at the occupancy
that registers, shared memory and threads allow, and the bytes that the loads of one trip keep in flight on an SM (3.35
TB/s at 600 ns of latency need about 15 KiB).
"""

import argparse
import collections
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from disassembly import SHARED_LIMITS, Code, disassemble
from launch_trace import tensor_bytes, trace_step
from torch import Tensor

from effnet_kernels.backends.triton.compilation import Binary, binary_of
from effnet_kernels.backends.triton.configs import Target, use_target
from effnet_kernels.backends.triton.launch import Launch

MULTIPROCESSORS: dict[int | str, int] = {
    80: 108,
    86: 84,
    89: 128,
    90: 132,
    100: 148,
    120: 170,
    "gfx942": 304,
    "gfx1100": 96,
}
# The bytes of spills of tiles that an H200 measured to be faster than those that avoid them.
SPILLS = {
    "pointwise_conv_kernel": 104,
    "pointwise_conv_backward_data_kernel": 24,
    # Two registers, on sm_80, where without them half as many programs would fit a multiprocessor.
    "depthwise_conv_kernel": 8,
}
MODELS = ("efficientnet_b0", "efficientnet_b4", "efficientnet_v2_s")
BATCHES = (1, 64, 256)
# Faults of these targets are reported, but are no failure: the rules are not made for AMD's consumer GPUs.
LENIENT = ("gfx1100",)

CLOCK, SMS, BANDWIDTH = 1.755e9, 132, 3.35e12


class Case(NamedTuple):
    """A launch of a step."""

    model: str
    dtype: str
    batch: int
    training: bool
    launch: Launch


def cases(target: Target, models: Iterable[str], dtypes: Iterable[str], batches: Iterable[int]) -> list[Case]:
    found = []
    with use_target(target):
        for model in models:
            for dtype in dtypes:
                for batch in batches:
                    for training in (True, False):
                        step = trace_step(model, batch, dtype, training)
                        launches = [*step.forward.launches, *(step.backward.launches if step.backward else [])]
                        found += [Case(model, dtype, batch, training, launch) for launch in launches]
    return found


def target_named(name: str) -> Target:
    """ "sm_90" or "gfx942"."""
    architecture = int(name.removeprefix("sm_")) if name.startswith("sm_") else name
    if architecture not in MULTIPROCESSORS:
        raise SystemExit(f"--targets: expected sm_80, 86, 89, 90, 100, 120, gfx942 or gfx1100, got {name}")
    return Target("cuda" if isinstance(architecture, int) else "hip", architecture, MULTIPROCESSORS[architecture])


def compile_all(binaries: list[Binary], architecture: int | str, processes: int) -> dict[Binary, Code | str]:
    """Each binary's code, or the error that the compiler gave."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        codes = pool.starmap(_disassembled, [(binary, architecture) for binary in binaries], chunksize=1)
    return dict(zip(binaries, codes, strict=True))


def _disassembled(binary: Binary, architecture: int | str) -> Code | str:
    try:
        return disassemble(binary, architecture)
    except Exception as error:  # a compiler raises anything, which becomes a row of the report
        return f"{type(error).__name__}: {error}"


def faults(binary: Binary, code: Code | str, architecture: int | str) -> list[str]:
    """The requirements that a binary violates."""
    if isinstance(code, str):
        return [f"does not compile: {code}"]
    found = []
    if code.shared > SHARED_LIMITS[architecture]:
        found.append(f"{code.shared} bytes of shared memory, the limit is {SHARED_LIMITS[architecture]}")
    if code.spills > SPILLS.get(binary.kernel.__name__, 0):
        found.append(f"{code.spills} bytes of spills")
    if binary.kernel.__name__.startswith("pointwise_conv") and _wide(binary) and code.access < 16:
        found.append(f"accesses to maps of {code.access} bytes")
    return found


def _wide(binary: Binary) -> bool:
    constants = dict(binary.constants)
    return constants["IN_DIVISOR"] == constants["OUT_DIVISOR"] == 8


def trips(launch: Launch) -> tuple[float, float]:
    """Trips of a program's loop over tiles or strips, and of the loop within it."""
    a, c, grid = launch.arguments, launch.constants, launch.grid
    name = launch.kernel.__name__
    if name in ("pointwise_conv_kernel", "pointwise_conv_backward_data_kernel"):
        inner = (
            a["in_quotient"] * c["IN_DIVISOR"]
            if name == "pointwise_conv_kernel"
            else a["out_quotient"] * c["OUT_DIVISOR"]
        )
        return a["groups"] * -(-a["rows"] // c["BLOCK_M"]) / grid[1], -(-inner // c["BLOCK_K"])
    if name == "pointwise_conv_backward_weight_kernel":
        return a["groups"] * -(-a["rows"] // c["BLOCK_K"]) / grid[2], 0
    if name == "depthwise_conv_kernel":
        steps = a["strip_height"] + (c["K"] - 1) // c["STRIDE"] - a["first_step"]
        return -(-a["strips"] // c["STRIPS"]) / grid[0], steps
    if name == "depthwise_conv_backward_kernel":
        steps = a["strip_height"] // c["STRIDE"] + (c["K"] - 1) // c["STRIDE"]
        return -(-a["strips"] // c["STRIPS"]) / grid[0], steps
    return -(-a["rows"] // c["BLOCK_M"]) / grid[0], 0


# The kernels that walk over maps; those on vectors take no time beside them.
WALKERS = {
    "pointwise_conv_kernel", "pointwise_conv_backward_data_kernel", "pointwise_conv_backward_weight_kernel",
    "depthwise_conv_kernel", "depthwise_conv_backward_kernel", "bn_act_add_kernel", "squeeze_kernel",
    "gradient_sums_kernel", "apply_gradient_kernel", "channel_statistics_kernel",
}  # fmt: skip


class Estimate(NamedTuple):
    """One launch on an H100."""

    instructions: float  # of a thread, an element of the launch's largest map
    bound: float  # share of the DRAM bound
    limit: str  # the resource that the bound is due to
    programs: int
    steps: int  # of a program, one after the other
    occupancy: int  # blocks an SM
    waves: float
    in_flight: int  # bytes an SM


def estimate(launch: Launch, code: Code) -> Estimate:
    assert code.depths is not None
    warps = launch.num_warps
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    outer, inner = trips(launch)
    outside, tile, step = code.depths

    def total(kind: str) -> float:
        """Of all warps of the launch."""
        return programs * warps * (outside[kind] + outer * (tile[kind] + inner * step[kind]))

    seconds = {
        "instructions": total("issued") / 4,
        "FMA": total("fma") * 32 / 128,
        "special functions": total("special") * 32 / 16,
        "L1": total("global") * 32 / 128,
        "shared memory": total("shared") * 32 / 128,
    }
    seconds = {name: cycles / SMS / CLOCK for name, cycles in seconds.items()}
    seconds["matrix units"] = _multiplications(launch) * 2 / (494e12 if _is_fp32(launch) else 989e12)
    seconds["DRAM"] = tensor_bytes(launch) / BANDWIDTH
    limit = max(seconds, key=lambda name: seconds[name])
    largest = max(t.numel() for t in launch.arguments.values() if isinstance(t, Tensor))
    occupancy = min(
        65536 // (-(-code.registers // 8) * 8 * 32 * warps),
        (228 << 10) // (code.shared + 1024),
        2048 // (32 * warps),
        32,
    )
    resident = min(occupancy, programs / SMS)
    loads = (step if inner else tile)["global"]
    return Estimate(
        total("issued") * 32 / largest,
        seconds["DRAM"] / seconds[limit],
        limit,
        programs,
        math.ceil(outer) * max(math.ceil(inner), 1),
        occupancy,
        programs / (SMS * occupancy),
        int(resident * warps * 32 * loads),
    )


def _is_fp32(launch: Launch) -> bool:
    maps = [
        t for t in launch.arguments.values() if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] * t.shape[3] > 1
    ]
    return max(maps, key=Tensor.numel).element_size() == 4


def _multiplications(launch: Launch) -> int:
    if not launch.kernel.__name__.startswith("pointwise"):
        return 0
    a, c = launch.arguments, launch.constants
    owners = launch.grid[2] if "backward_weight" not in launch.kernel.__name__ else 1
    return owners * a["groups"] * a["rows"] * a["in_quotient"] * c["IN_DIVISOR"] * a["out_quotient"] * c["OUT_DIVISOR"]


def report(names: list[str], options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Rows of binaries, rows of launches on an H100, and the number of faults that count."""
    binaries_rows, launch_rows, failures = [], [], 0
    for name in names:
        target = target_named(name)
        found = cases(target, options.models, options.dtypes, options.batches)
        binaries = list(dict.fromkeys(binary_of(case.launch) for case in found))
        codes = compile_all(binaries, target.architecture, options.processes)
        worst = collections.Counter()
        for binary, code in codes.items():
            wrong = faults(binary, code, target.architecture)
            fields = {"error": code} if isinstance(code, str) else {**code._asdict(), "depths": None}
            binaries_rows.append({"target": name, "binary": str(binary), "faults": wrong, **fields})
            for fault in wrong:
                lenient = name in LENIENT
                failures += not lenient
                print(f"{'note' if lenient else 'FAULT'}: {name}: {binary}: {fault}")
            if not isinstance(code, str):
                worst["registers"] = max(worst["registers"], code.registers)
                worst["spills"] = max(worst["spills"], code.spills)
                worst["shared"] = max(worst["shared"], code.shared)
        narrow = [c for b, c in codes.items() if not isinstance(c, str) and 0 < c.access_warp < 128]
        limit = SHARED_LIMITS[target.architecture] >> 10
        print(
            f"{name:8} {len(binaries):4} binaries, at most {worst['registers']} registers, {worst['spills']} bytes of "
            f"spills, {worst['shared'] >> 10} of {limit} KiB "
            f"shared; {len(narrow)} move less than 128 bytes of a map a warp",
            flush=True,
        )
        if target.architecture == 90:
            launch_rows = estimates(found, codes)
    return binaries_rows, launch_rows, failures


def estimates(found: list[Case], codes: dict[Binary, Code | str]) -> list[dict[str, Any]]:
    rows = []
    for case in found:
        code = codes[binary_of(case.launch)]
        if case.launch.kernel.__name__ in WALKERS and not isinstance(code, str):
            maps = {
                argument: list(t.shape)
                for argument, t in case.launch.arguments.items()
                if isinstance(t, Tensor) and t.dim() > 2
            }
            rows.append(
                {
                    **case._asdict(),
                    "launch": case.launch.kernel.__name__,
                    "constants": case.launch.constants,
                    "maps": maps,
                    "bytes": tensor_bytes(case.launch),
                    **estimate(case.launch, code)._asdict(),
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel, dtype, pass and batch: medians over the launches, weighted by their bytes."""
    lines = [
        "",
        "H100, modelled (see --help): medians over the bytes that the launches move; the fewest programs and the most "
        "steps of a launch",
        f"{'kernel':38}{'dtype':6}{'batch':>6}{'pass':>10}{'instr./elem.':>13}{'bound':>7}{'worst':>7}{'programs':>10}"
        f"{'steps':>7}{'waves':>8}{'KiB in flight':>15}",
    ]
    groups: dict[tuple, list[dict[str, Any]]] = collections.defaultdict(list)
    key: Callable[[dict[str, Any]], tuple] = lambda row: (_variant(row), row["dtype"], row["batch"], row["training"])  # noqa: E731
    for row in rows:
        groups[key(row)].append(row)
    for (name, dtype, batch, training), members in sorted(groups.items()):
        lines.append(
            f"{name:38}{dtype:6}{batch:6}{'training' if training else 'inference':>10}"
            f"{_weighted(members, 'instructions'):13.1f}{_weighted(members, 'bound'):7.0%}"
            f"{min(row['bound'] for row in members):7.0%}{min(row['programs'] for row in members):10}"
            f"{max(row['steps'] for row in members):7}{_weighted(members, 'waves'):8.1f}"
            f"{_weighted(members, 'in_flight') / 1024:15.1f}"
        )
    return "\n".join(lines)


def _variant(row: dict[str, Any]) -> str:
    constants = row["constants"]
    size = f" k{constants['K']} s{constants['STRIDE']}" if "STRIDE" in constants else ""
    return row["launch"].removesuffix("_kernel") + size


def _weighted(rows: list[dict[str, Any]], field: str) -> float:
    """The median over the bytes moved."""
    ordered = sorted(rows, key=lambda row: row[field])
    half, seen = sum(row["bytes"] for row in rows) / 2, 0
    for row in ordered:
        seen += row["bytes"]
        if seen >= half:
            return row[field]
    return statistics.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(f"sm_{a}" if isinstance(a, int) else a for a in MULTIPROCESSORS)
    parser.add_argument("--targets", default=every)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="fp16,fp32")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument(
        "--subset", action="store_true", help="B0 in fp16 at batch 64 on sm_90 and gfx942: a few minutes"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.subset:
        options.targets, options.models, options.dtypes, options.batches = "sm_90,gfx942", MODELS[0], "fp16", "64"
    options.models, options.dtypes = options.models.split(","), options.dtypes.split(",")
    options.batches = [int(batch) for batch in options.batches.split(",")]
    binaries, launches, failures = report(options.targets.split(","), options)
    if launches:
        print(summary(launches))
    if options.json:
        options.json.write_text(json.dumps({"binaries": binaries, "launches": launches}, indent=1))
    print(f"{failures} faults" if failures else "no faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
