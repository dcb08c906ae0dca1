"""The extension as a library: instruction sets, threads, forks, and life without it."""

import os
import sys
import threading

import pytest
import torch
from conftest import run_python
from native_cases import kernel_isas, needs_linux, needs_native

from effnet_kernels import cpu, ops
from effnet_kernels.cpu import extension as loader
from effnet_kernels.cpu.extension import extension

CALL = """
import torch
from effnet_kernels import cpu, ops
torch.set_num_threads(1)  # torch's own operators stay in this thread, where a forked child's would hang
x = torch.randn(1, 64, 64, 64).to(memory_format=torch.channels_last)
torch.set_num_threads(2)
y, pooled = ops.depthwise_conv(x, torch.randn(64, 1, 3, 3), 1, 1, reduction="pool")
"""


@needs_native
def test_supported_isas_are_rows_of_the_table():
    assert set(cpu.supported_isas()) <= set(kernel_isas())
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
