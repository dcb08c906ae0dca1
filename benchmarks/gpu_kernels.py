"""Times every distinct launch of a step on a GPU against the rate at which the device copies.

    python benchmarks/gpu_kernels.py [--inference] [--batch 256] [--dtype fp16] [--seconds N] [--json FILE]
    python benchmarks/gpu_kernels.py --weakest FILE [--number 3]
    python benchmarks/gpu_kernels.py --only INDEX ...

The launches are captured on meta tensors with this device's configurations, and each runs alone, on random data and
with a cold cache. Its bound is the time to copy as many bytes as its tensors have, or that of the smallest copy. What
it loses is its time beyond that, times the number of such launches in the step. ``--weakest`` prints index and kernel
of the launches of an earlier run that lose most, and ``--only`` makes one of them a few times, for a profiler.
``--toy`` takes sizes for machines without a GPU, whose times mean nothing.
"""

import argparse
import collections
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from launch_trace import DTYPES, RESOLUTIONS, tensor_bytes, trace_step
from requested_bytes import requested_bytes
from results import Results
from torch import Tensor

from effnet_kernels.backends.triton.compilation import compile_in_parallel, distinct, gpu_target
from effnet_kernels.backends.triton.configs import Target, device_target, use_target
from effnet_kernels.backends.triton.launch import Launch
from effnet_kernels.tools import timing

Row = dict[str, Any]


def launches(options: argparse.Namespace, target: Target) -> list[tuple[Launch, int]]:
    """The distinct launches of the step, and how often it makes each; the same on every run."""
    batch, resolution = (2, 64) if options.toy else (options.batch, RESOLUTIONS[options.model])
    with use_target(target):
        step = trace_step(options.model, batch, options.dtype, not options.inference, resolution=resolution)
    return timing.distinct_launches([*step.forward.launches, *(step.backward.launches if step.backward else [])])


def describe(launch: Launch) -> Row:
    maps = [a for a in launch.arguments.values() if isinstance(a, Tensor) and a.dim() == 4]
    return {
        "kernel": launch.kernel.__name__,
        "map": list(max(maps, key=Tensor.numel).shape) if maps else [],
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "options": dict(launch.options),
        "grid": launch.grid,
        "bytes": tensor_bytes(launch),
        "requested bytes": sum(requested_bytes(launch).values()),
    }


def measure(launch: Launch, count: int, rate: float, floor: float, rounds: int) -> Row:
    call = timing.replay(launch)
    times = timing.interleaved({"launch": call}, rounds)["launch"]
    milliseconds = statistics.median(times)
    bound = max(1e3 * tensor_bytes(launch) / rate, floor)
    return {
        "ms": milliseconds,
        "least ms": min(times),
        "bound ms": bound,
        "of bound": bound / milliseconds,
        "lost ms": count * (milliseconds - bound),
    }


def run(options: argparse.Namespace, target: Target) -> int:
    found = launches(options, target)
    results = Results(options.json, options.seconds, options={k: str(v) for k, v in vars(options).items()})
    # One that does not compile is an error of its launch.
    with contextlib.suppress(RuntimeError):
        compile_in_parallel(distinct(launch for launch, _ in found), gpu_target(target.architecture))
    rate = timing.copy_bandwidth()
    few = torch.zeros(2, 64, device="cuda")
    floor = timing.medians(timing.interleaved({"copy": lambda: few[0].copy_(few[1])}, 20))["copy"]
    results.data |= {"copy GB/s": rate / 1e9, "smallest copy ms": floor}
    print(f"{sum(count for _, count in found)} launches, {len(found)} distinct; a copy moves {rate / 1e9:.0f} GB/s")
    # Those that move most come first, in case the time ends.
    order = sorted(range(len(found)), key=lambda index: -found[index][1] * tensor_bytes(found[index][0]))
    failed, unmeasured = 0, 0
    for index in order:
        launch, count = found[index]
        row: Row = {"index": index, "count": count, **describe(launch)}
        if results.left() < 0:
            unmeasured += 1
            continue
        try:
            row |= measure(launch, count, rate, floor, options.rounds)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            failed += 1
            print(f"#{index} {row['kernel']} {row['map']}: {row['error']}", flush=True)
        results.put("launches", str(index), row)
    print(summary([row for row in results.data["launches"].values() if "ms" in row]))
    print(f"{failed} failed, {unmeasured} were not measured for lack of time")
    return 1 if failed or len(found) == unmeasured else 0


def summary(rows: list[Row], number: int = 20) -> str:
    """A line for each kernel, and one for each of the launches that lose most."""
    kernels: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        kernels[row["kernel"]].append(row)

    def total(members: list[Row], field: str) -> float:
        return sum(row["count"] * row[field] for row in members)

    lines = [f"{'kernel':42}{'launches':>9}{'ms':>10}{'bound ms':>10}{'of bound':>9}"]
    parts = sorted(kernels.items(), key=lambda part: -total(part[1], "ms"))
    for name, members in [*parts, ("all", rows)]:
        spent, bound = total(members, "ms"), total(members, "bound ms")
        share = bound / spent if spent else 0.0
        lines.append(f"{name:42}{sum(row['count'] for row in members):9}{spent:10.3f}{bound:10.3f}{share:9.0%}")
    lines.append("launches that lose most:")
    for row in sorted(rows, key=lambda row: -row["lost ms"])[:number]:
        lines.append(
            f"#{row['index']:<4}{row['count']:3} x {row['ms']:8.4f} ms {row['of bound']:5.0%} of the bound, "
            f"{row['lost ms']:7.3f} ms lost: {row['kernel']} {row['map']}"
        )
    return "\n".join(lines)


def weakest(path: Path, number: int) -> list[tuple[int, str]]:
    """Index and kernel of the launches of an earlier run that lose most, one of each kernel."""
    rows = [row for row in json.loads(path.read_text())["launches"].values() if "ms" in row]
    found: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: -row["lost ms"]):
        found.setdefault(row["kernel"], row["index"])
    return [(index, kernel) for kernel, index in found.items()][:number]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0", choices=RESOLUTIONS)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15, help="timed launches of each (15)")
    parser.add_argument("--seconds", type=float, help="after which no more is timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--weakest", type=Path, metavar="FILE")
    parser.add_argument("--number", type=int, default=3, help="of the weakest (3)")
    parser.add_argument("--only", type=int, metavar="INDEX")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if options.weakest:
        for index, kernel in weakest(options.weakest, options.number):
            print(index, kernel)
        return 0
    target = device_target(torch.device("cuda"))
    if options.only is None:
        return run(options, target)
    launch, _ = launches(options, target)[options.only]
    call = timing.replay(launch)
    for _ in range(4):
        call()
    timing.synchronize()
    print(describe(launch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
