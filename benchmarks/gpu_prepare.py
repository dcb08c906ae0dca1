"""Compiles what ``scripts/gpu_day.sh`` launches, on a machine without a GPU, so that a borrowed GPU waits for nothing.

    python benchmarks/gpu_prepare.py DIRECTORY [--fields 2] [--processes N] [--toy]

DIRECTORY becomes Triton's cache. A kernel's key in it has the versions of torch and Triton, so that this has to run
with those of the GPU's machine. The cache's files name each other by path: there, DIRECTORY has to lie at the same
path, and TRITON_CACHE_DIR has to name it. What only the compiler reads is emptied, which leaves about 20 KB a kernel.

The kernels are those of tests/gpu, of B0 as ``gpu_cases.py`` and the self-test run it, and of the tuner's candidates,
for an H100 or an H200.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_trace import DTYPES, trace_step

import effnet_kernels as ek
from effnet_kernels.backends.triton import launch
from effnet_kernels.backends.triton.compilation import Binary, compile_in_parallel, distinct, gpu_target
from effnet_kernels.backends.triton.configs import H100, use_target
from effnet_kernels.backends.triton.launch import Launch
from effnet_kernels.tools import tune
from effnet_kernels.tools.warmup import launches_of_step

ROOT = Path(__file__).resolve().parents[1]
# What names the file that the plugin below writes.
RECORD = "EFFNET_BINARIES"
_recorded: dict[Binary, None] = {}


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """As a plugin after ``gpu.fake_gpu``, whose launches do nothing: records the binary of each."""
    run = launch._run

    def record(key: Any, *asked: Any) -> None:
        run(key, *asked)
        captured: list[Launch] = []
        launch._capture(captured, key, *asked)
        _recorded.update(dict.fromkeys(distinct(captured)))

    launch._run = record


def pytest_sessionfinish() -> None:
    Path(os.environ[RECORD]).write_bytes(pickle.dumps(list(_recorded)))


def of_tests(arguments: Sequence[str] = ()) -> list[Binary]:
    """The binaries that tests/gpu launches, until the first value that a test looks at."""
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch, "binaries")
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.fake_gpu"]
        command += ["-p", "gpu_prepare", "tests/gpu", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), RECORD: str(record)}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        found: list[Binary] = pickle.loads(record.read_bytes())
    return found


def of_networks(toy: bool) -> Iterator[Launch]:
    """The launches of B0's steps in all dtypes that are timed or checked; those of its engines are left to warmup.

    A training step is that of autocast, whose weights are in float32, and one in which they are as the maps are.
    """
    model = ek.create_model("efficientnet_b0")
    resolution, batches = 32 if toy else 224, [2] if toy else [256, 64, 4, 1]
    for batch in batches:
        for name, dtype in DTYPES.items():
            yield from launches_of_step(model, (batch, 3, resolution, resolution), True, dtype)
            for training in (True, False):
                step = trace_step("efficientnet_b0", batch, name, training, resolution=resolution)
                yield from [*step.forward.launches, *(step.backward.launches if step.backward else [])]


def of_tuner(fields: int) -> Iterator[Launch]:
    """The launches of the tuner's candidates."""
    model = ek.create_model("efficientnet_b0")
    for trials in tune.Tuning(fields).rounds(lambda: tune._launches(model, (256, 3, 224, 224), torch.float16)):
        for trial in trials:
            yield from (each for each, _ in trial.launches)


def empty_what_launches_do_not_read(cache: Path) -> None:
    """The files stay, because Triton compiles again what has lost one."""
    for path in cache.rglob("*"):
        if path.is_file() and path.suffix not in (".cubin", ".json"):
            path.write_bytes(b"")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--fields", type=int, default=2, help="of a tile that the tuner varies at once (2)")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--toy", action="store_true", help="few and small, to try the script")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.directory.resolve())
    with use_target(H100):
        launches = [*of_networks(options.toy), *([] if options.toy else of_tuner(options.fields))]
        binaries = dict.fromkeys(distinct(launches))
    binaries |= dict.fromkeys(of_tests(["-k", "test_activations"] if options.toy else []))
    print(f"{len(binaries)} kernels", flush=True)
    try:
        compile_in_parallel(list(binaries), gpu_target(H100.architecture), options.processes)
    except RuntimeError as error:
        # A candidate of the tuner need not compile; the tuner rejects it.
        print(error)
    empty_what_launches_do_not_read(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
