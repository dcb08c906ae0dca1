"""The extension as a library: instruction sets, threads, forks, and life without it."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_python
from native_cases import needs_linux, needs_native, sanitized_folder

import effnet_kernels
from effnet_kernels import ops
from effnet_kernels.backends import cpu
from effnet_kernels.backends.cpu import extension as loader
from effnet_kernels.backends.cpu.extension import extension

CALL = """
import torch
from effnet_kernels.backends import cpu
from effnet_kernels import ops
torch.set_num_threads(1)  # torch's own operators stay in this thread, where a forked child's would hang
x = torch.randn(1, 64, 64, 64).to(memory_format=torch.channels_last)
torch.set_num_threads(2)
y, pooled = ops.depthwise_conv(x, torch.randn(64, 1, 3, 3), 1, 1, reduction="pool")
"""


@needs_native
def test_supported_isas_are_rows_of_the_table():
    assert set(cpu.supported_isas()) <= {row["isa"] for row in extension().kernels()}
    assert "scalar" in cpu.supported_isas()
    assert cpu.isa() in cpu.supported_isas()
    for row in extension().kernels():
        assert not (row["emulated"] and row["isa"] in cpu.supported_isas())


@needs_native
def test_every_isa_can_be_forced():
    for isa in cpu.supported_isas():
        done = run_python(CALL + "print(cpu.isa())", EFFNET_KERNELS_ISA=isa)
        assert done.stdout.strip() == isa, done.stderr


@needs_native
def test_unknown_isa_is_an_error_at_first_use():
    code = f"""
import os
for name in ("sse9", "emulated16"):
    os.environ["EFFNET_KERNELS_ISA"] = name
    try:
        exec({CALL!r})
    except ValueError as error:
        print(error)
"""
    errors = run_python(code).stdout.splitlines()
    for error, name in zip(errors, ("sse9", "emulated16"), strict=True):
        assert error.startswith(f"EFFNET_KERNELS_ISA: expected one of {', '.join(cpu.supported_isas())}")
        assert error.endswith(f"got '{name}'")


@needs_native
def test_isa_that_the_call_names_must_exist():
    with pytest.raises(ValueError, match="'sse9'"), cpu.use_isa("sse9"):
        ops.squeeze(torch.ones(1, 8, 4, 4))


@needs_native
@needs_linux
def test_two_threads_of_the_one_openmp_runtime():
    # The runtime starts its second thread at the first region of two, which is ours: torch's operators ran before.
    code = CALL.replace("y, pooled =", "import os, re; alone = len(os.listdir('/proc/self/task')); y, pooled =")
    code += """
print(len(os.listdir("/proc/self/task")) - alone)
maps = open("/proc/self/maps").read()
print(sorted(set(re.findall(r"/[^ ]*/lib(?:gomp|omp|iomp5)[^/ ]*[.]so[^/ ]*(?=\\n)", maps))))
print(cpu.describe()["threads"])
"""
    done = run_python(code)
    started, runtimes, library = done.stdout.strip().splitlines()
    assert started == "1"
    assert runtimes == repr([os.path.realpath(library)]), done.stdout + done.stderr


@needs_native
@needs_linux
def test_forked_child_computes_alone():
    code = (
        CALL
        + """
import os, signal
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    _, pooled = ops.depthwise_conv(x, torch.ones(64, 1, 3, 3), 1, 1, reduction="pool")
    good = cpu.describe()["threads"].startswith("serial: this process is a forked child")
    os._exit(0 if good and torch.isfinite(pooled).all() else 3)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""
    )
    done = run_python(code, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@needs_native
def test_several_python_threads_at_once():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 48, 48).to(memory_format=torch.channels_last)
    weights = [torch.randn(64, 1, 3, 3) for _ in range(4)]
    expected = [ops.depthwise_conv(x, w, 1, 1, reduction="pool") for w in weights]
    wrong = []

    def work(index):
        for _ in range(10):
            y, pooled = ops.depthwise_conv(x, weights[index], 1, 1, reduction="pool")
            if not (torch.equal(y, expected[index][0]) and torch.equal(pooled, expected[index][1])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "effnet_kernels._native", None)
    loader.load.cache_clear()
    loader.warn_if_unavailable.cache_clear()
    yield
    loader.load.cache_clear()
    loader.warn_if_unavailable.cache_clear()


def test_missing_extension_warns_once(without_extension, recwarn):
    assert "no native extension in" in cpu.unavailable_reason()
    cpu.warn_if_unavailable()
    cpu.warn_if_unavailable()
    assert [w.category for w in recwarn] == [cpu.NativeExtensionWarning]
    assert list(cpu.describe()) == ["unavailable"]
    with pytest.raises(RuntimeError, match="no CPU kernels here"):
        cpu.isa()


def test_failed_build_is_explained(without_extension, monkeypatch, tmp_path):
    reason = tmp_path / "reason.txt"
    reason.write_text("cmake was not found\n")
    monkeypatch.setattr(loader, "FAILURE_FILE", reason)
    assert cpu.unavailable_reason().endswith("cmake was not found")


@needs_native
@needs_linux
@pytest.mark.parametrize("what", ["truncated", "empty", "no library", "stale"])
def test_an_extension_that_cannot_be_trusted_is_named(what, tmp_path):
    """The loader would die of one that ends early, and one of another build would misread arguments."""
    package = Path(effnet_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "effnet_kernels", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    library = Path(extension().__file__)
    copied = tmp_path / "effnet_kernels" / library.name
    contents = {"truncated": library.read_bytes()[:100_000], "empty": b"", "no library": b"x" * 1000}
    copied.write_bytes(contents.get(what, library.read_bytes()))
    if what == "stale":
        loader_file = tmp_path / "effnet_kernels" / "backends" / "cpu" / "extension.py"
        loader_file.write_text(loader_file.read_text().replace("INTERFACE = ", "INTERFACE = 1 + "))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import effnet_kernels, torch
assert effnet_kernels.__file__.startswith({str(tmp_path)!r})
print(effnet_kernels.backends.cpu.unavailable_reason())
print(effnet_kernels.efficientnet_b0().eval()(torch.randn(1, 3, 32, 32)).shape)
"""
    done = run_python(code)
    reason, shape = done.stdout.strip().rsplit("\n", 1)
    assert shape == "torch.Size([1, 1000])", done.stderr
    expected = {"stale": "is of another version", "no library": "cannot be imported"}.get(what, "is truncated")
    assert expected in reason


FORKING = """
import os, signal, threading, torch
import effnet_kernels as ek
torch.set_num_threads(1)
def network():
    return ek.EfficientNet([ek.MBConvConfig(2, 3, 2, 8, 16, 1)], 0.0, 0.0, num_classes=3).eval()
model = network()
shared = ek.freeze(model)
shared._forget()
stop = threading.Event()
# Nothing here draws random numbers, for which torch has a lock of its own that a forked child may find taken.
def calls():
    # First calls of engines, first calls of sizes, and maps that come and go.
    size = 0
    while not stop.is_set():
        size = size % 40 + 1
        with torch.no_grad():
            ek.freeze(model, verify=False)(torch.ones(1, 3, 16 + size, 20))
            shared(torch.ones(1, 3, 20, 16 + size))
            model(torch.ones(1, 3, 96, 96))
        ek.release_memory()
threads = [threading.Thread(target=calls) for _ in range(3)]
for thread in threads:
    thread.start()
ended = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        with torch.no_grad():
            shared(torch.ones(1, 3, 57, 57))
            ek.freeze(model, verify=False)(torch.ones(1, 3, 32, 32))
        os._exit(0)
    ended.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads:
    thread.join()
print(ended)
"""


@needs_native
@needs_linux
@pytest.mark.skipif(
    sanitized_folder is not None, reason="GCC's address sanitizer has locks that a forked child may find taken"
)
def test_a_fork_while_other_threads_call_for_the_first_time():
    done = run_python(FORKING, timeout=300)
    assert done.stdout.strip() == str([0] * 40), done.stderr


@needs_native
@needs_linux
def test_the_memory_of_engines_can_be_given_back():
    code = """
import resource, torch
import effnet_kernels as ek
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
engine, x = ek.freeze(ek.efficientnet_b0()), torch.randn(4, 3, 640, 640)
first = engine(x)
before = resident()
ek.release_memory()
print(before - resident() > 20 * 2**20, torch.equal(engine(x), first))
"""
    done = run_python(code)
    assert done.stdout.strip() == "True True", done.stdout + done.stderr
