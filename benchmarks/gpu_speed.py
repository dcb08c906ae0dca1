"""Times the cases of ``gpu_cases.py`` on a GPU, ours beside each contender, within a budget.

    python benchmarks/gpu_speed.py [--cases REGEX] [--contenders REGEX] [--seconds N] [--json FILE]

A contender is built alone and timed in turn with ours, so that ours has a time beside each and a drift shows. One that
fails gets a row with its error, and the others go on. Results are written after each contender. Those that
torch.compile builds, which takes minutes, come after all others of all cases. ``--toy`` takes sizes for machines
without a GPU, whose times mean nothing.
"""

import argparse
import re
import statistics
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from results import Results

from effnet_kernels.backends.triton.launch import simulated
from effnet_kernels.tools import timing

# A compiled contender is begun only with this much time left.
COMPILE_SECONDS = 60
LARGEST = 15

Row = dict[str, Any]


class Speed:
    """Measures contenders of cases into ``results``, each where it has not been measured yet."""

    def __init__(self, results: Results, rounds: int, warm: int) -> None:
        self.results, self.rounds, self.warm = results, rounds, warm
        self.bandwidth = 0.0 if simulated() else timing.copy_bandwidth()
        results.data |= {
            "device": "simulated: times mean nothing" if simulated() else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy GB/s": self.bandwidth / 1e9,
            "cases": {},
        }

    def rows(self, case: gpu_cases.Case) -> dict[str, Row]:
        return self.results.data["cases"].setdefault(case.name, {})

    def measure(self, case: gpu_cases.Case, names: Sequence[str]) -> dict[str, Row]:
        """The rows of a case, of whose contenders these are measured now."""
        rows = self.rows(case)
        ours, contenders = None, {}
        if any(name not in rows for name in names) and self.results.left() > 0:
            try:
                contenders = case.build()
                call = contenders["ours"]()
                call()
                ours = call
            except Exception as error:  # without ours, the others are timed alone
                self._keep(case, "ours", _failed(error))
        for name in names:
            if name in rows:
                continue
            if self.results.left() < (COMPILE_SECONDS if name.startswith(gpu_cases.COMPILED) else 0):
                self._keep(case, name, {"skipped": "no time was left"})
                continue
            try:
                row = self._measure(case, name, contenders[name]() if name != "ours" else ours, ours)
            except Exception as error:  # a contender that cannot run gets a row with its error
                row = _failed(error)
            self._keep(case, name, row)
            if name != "ours":
                gpu_cases.release()
        return rows

    def _keep(self, case: gpu_cases.Case, name: str, row: Row) -> None:
        self.rows(case)[name] = row
        self.results.put("cases", case.name, self.rows(case))
        shown = (
            row.get("error")
            or row.get("skipped")
            or f"{statistics.median(row['ms']):9.3f} ms {row['images/s']:9.0f} images/s"
        )
        shown += f"  {row['ratio']:5.2f} times ours" if "ratio" in row else ""
        print(f"{case.name:44} {name:40} {shown}", flush=True)

    def _measure(self, case: gpu_cases.Case, name: str, call: gpu_cases.Call, ours: gpu_cases.Call | None) -> Row:
        row: Row = {"peak MB": _peak(call)}
        contenders = {name: call}
        if ours is not None and name != "ours":
            _agree(name, call, ours)
            contenders = {"ours": ours, name: call}
        times = timing.interleaved(contenders, self.rounds, self.warm)
        medians = timing.medians(times)
        row |= {"ms": times[name], "images/s": 1e3 * case.images / medians[name]}
        if len(times) > 1:
            row |= {"ours ms": times["ours"], "ratio": medians[name] / medians["ours"]}
        if ours is not None and self.bandwidth:
            # The bytes are those of our launches, so that a baseline's rate is that of moving as many.
            rate = gpu_cases.bytes_of(ours) / medians[name] * 1e3
            row |= {"GB/s": rate / 1e9, "of copy": rate / self.bandwidth}
        if not simulated():
            row |= {
                "host ms": timing.host_milliseconds(call, min(5, self.rounds)),
                **_kernels(call, min(3, self.rounds)),
            }
        return row


def _failed(error: Exception) -> Row:
    """A row in the place of times. The traceback goes to stderr."""
    traceback.print_exception(error, limit=-6)
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def _agree(name: str, call: gpu_cases.Call, ours: gpu_cases.Call) -> None:
    """Operators are timed only where their gradients are eager's; networks have weights of their own (see selftest)."""
    if name == "eager channels-last":
        one, other = (torch.cat([g.float().flatten() for g in gradients()]) for gradients in (ours, call))
        error = float((one - other).norm() / other.norm())
        assert error < 0.02, f"our gradients differ from eager's by {error:.2e}"


def _peak(call: gpu_cases.Call) -> float:
    """Megabytes that a call allocates at most."""
    call()
    if simulated():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _kernels(call: gpu_cases.Call, rounds: int) -> Row:
    """The number of kernels of a call, the GPU's milliseconds in them, and the largest, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            call()
        timing.synchronize()
    # An operator on the host has the time of its kernels, too, which would count twice, and so has a named range.
    kernels = [
        event
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    return {
        "kernels": sum(event.count for event in kernels) / rounds,
        "busy ms": sum(event.self_device_time_total for event in kernels) / rounds / 1e3,
        "largest": [
            {"kernel": e.key[:120], "ms": e.self_device_time_total / rounds / 1e3, "calls": e.count / rounds}
            for e in kernels[:LARGEST]
        ],
    }


def chosen(toy: bool, cases: str, contenders: str) -> list[tuple[gpu_cases.Case, list[str]]]:
    """The cases and their contenders whose names the patterns find somewhere; ours is always among them."""
    found = []
    for case in gpu_cases.cases(toy):
        names = [name for name in case.names if name == "ours" or re.search(contenders, name)]
        if re.search(cases, case.name):
            found.append((case, names))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="REGEX", help="of names of cases; all")
    parser.add_argument("--contenders", default="", metavar="REGEX", help="of names of contenders; all")
    parser.add_argument("--seconds", type=float, help="after which nothing more is begun")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each contender (20)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    # Baselines get the fastest of cuDNN's algorithms.
    torch.backends.cudnn.benchmark = True
    speed = Speed(Results(options.json, options.seconds), options.rounds, min(5, options.rounds))
    selected = chosen(options.toy, options.cases, options.contenders)
    for compiled in (False, True):
        for case, names in selected:
            speed.measure(case, [name for name in names if name.startswith(gpu_cases.COMPILED.strip()) == compiled])
            gpu_cases.release()
    failed = [
        f"{case}: {name}: {row['error']}"
        for case, rows in speed.results.data["cases"].items()
        for name, row in rows.items()
        if "error" in row
    ]
    print(*failed, sep="\n")
    return 1 if failed or not selected else 0


if __name__ == "__main__":
    sys.exit(main())
