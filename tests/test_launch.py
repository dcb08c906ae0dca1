"""Launches, with a driver that compiles kernels and does not run them."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import run_python

from effnet_kernels.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")


def bn_act_add(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    from effnet_kernels.backends.triton.bn_act_add import bn_act_add
    from effnet_kernels.backends.triton.configs import H100, use_target
    from effnet_kernels.fusion.spec import Prologue

    with use_target(H100):
        return bn_act_add(x, Prologue(scale), None, None)


def test_a_second_launch_is_the_first_one_again() -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton import launch as seam

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    with stub_driver() as driver:
        for _ in range(3):
            bn_act_add(x)
        first, second, third = driver.launched
        assert len(seam._handles) == 1
    assert len(first) == len(second) == len(third)
    # Arguments 6 to 8 are for profilers, and a cached launch leaves them out. It passes the addresses of tensors.
    for one, other in zip(first[:6] + first[9:], second[:6] + second[9:], strict=True):
        assert isinstance(other, int) if isinstance(one, torch.Tensor) else one is other or one == other
    given = [argument for argument in first if isinstance(argument, torch.Tensor)]
    assert given[0].data_ptr() in second


def test_what_needs_another_binary_gets_one() -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton import launch as seam

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    unaligned = torch.randn(2 * 16 * 7 * 9 + 1)[1:].view(2, 7, 9, 16).permute(0, 3, 1, 2)
    with stub_driver():
        for given in (x, x.half(), unaligned):
            bn_act_add(given)
        bn_act_add(x, torch.randn(16))
        assert len(seam._handles) == 4
        bn_act_add(torch.randn(3, 24, 5, 5).contiguous(memory_format=torch.channels_last))
        assert len(seam._handles) == 4, "other sizes need no other binary"


def test_a_kernel_compiled_ahead_is_the_one_that_a_launch_looks_for() -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton.compilation import binary_of, compile_for, gpu_target
    from effnet_kernels.backends.triton.launch import capture_launches

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    with capture_launches() as launches:
        bn_act_add(x, torch.randn(16))
    (launch,) = launches
    with stub_driver():
        arguments = {**launch.arguments, **launch.constants}
        compiled = launch.kernel[launch.grid](**arguments, **dict(launch.options))
    assert compile_for(binary_of(launch), gpu_target(90)).hash == compiled.hash


def test_kernels_compile_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effnet_kernels.backends.triton.compilation import compile_in_parallel, distinct, gpu_target
    from effnet_kernels.backends.triton.launch import capture_launches

    x, scale = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last), torch.randn(16)
    with capture_launches() as launches:
        for given in (x, x.half(), x.bfloat16()):
            bn_act_add(given)
            bn_act_add(given, scale)
    binaries = distinct(launches)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compile_in_parallel(binaries, gpu_target(90), processes=2)
    with pytest.raises(RuntimeError, match="expected 6 kernels to compile, but 6 failed: bn_act_add_kernel bf16"):
        compile_in_parallel(binaries, gpu_target(1), processes=2)
    # The system ends a process that takes too much memory.
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(RuntimeError, match=r"bn_act_add_kernel .*: its process ended with status -9"):
        compile_in_parallel(binaries, gpu_target(80), processes=2)
    # What is in the cache needs no process.
    compile_in_parallel(binaries, gpu_target(90), processes=2)


class OnDevice(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    index = 0

    def get_device(self) -> int:
        return self.index


def test_tensors_on_two_devices_are_refused() -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
    from effnet_kernels.backends.triton.launch import launcher

    one, other = (torch.randn(4).as_subclass(OnDevice) for _ in range(2))
    one.index, other.index = 1, -1
    given = dict.fromkeys(bn_act_add_kernel.arg_names) | {"x_ptr": one, "out_ptr": other, "rows": 1, "c_quotient": 1}
    with stub_driver(), pytest.raises(ValueError, match="expected tensors on one device, got the CPU, cuda:1"):
        launcher(bn_act_add_kernel)((1, 1, 1), **given)


def test_arguments_are_the_kernels_own() -> None:
    from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
    from effnet_kernels.backends.triton.launch import launcher

    given = dict.fromkeys(bn_act_add_kernel.arg_names)
    missing = {name: value for name, value in given.items() if name != "rows"}
    for arguments, message in (
        (missing, "launch_bn_act_add_kernel.* missing 1 required keyword-only argument: 'rows'"),
        (given | {"columns": 3}, "launch_bn_act_add_kernel.* got an unexpected keyword argument 'columns'"),
    ):
        with pytest.raises(TypeError, match=message):
            launcher(bn_act_add_kernel)((1, 1, 1), **arguments)


def test_parameters_do_not_hide_what_a_launcher_needs() -> None:
    from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
    from effnet_kernels.backends.triton.launch import _OWN_NAMES, launcher

    launch = launcher(bn_act_add_kernel)
    used = {*launch.__code__.co_names, *launch.__code__.co_varnames, *launch.__code__.co_cellvars}
    attributes = {"dtype", "get_device", "data_ptr", "bit_length", "get", "current_device", "_cuda_getCurrentRawStream"}
    pointers = {name for name in bn_act_add_kernel.arg_names if name.endswith("_ptr")}
    addresses = {name.removesuffix("_ptr") + "_address" for name in pointers}
    assert used - set(bn_act_add_kernel.arg_names) - attributes - addresses <= _OWN_NAMES


def test_integers_have_to_be_declared() -> None:
    """Triton makes other binaries for 1 and for multiples of 16, which a cached launch would mix up."""
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
    from effnet_kernels.backends.triton.launch import launcher

    given = dict.fromkeys(bn_act_add_kernel.arg_names) | {"x_ptr": torch.randn(4), "rows": 1, "c_quotient": 1, "eps": 0}
    with stub_driver(), pytest.raises(TypeError, match="expected the integer eps among those that are do_not_special"):
        launcher(bn_act_add_kernel)((1, 1, 1), **given)


def test_the_order_of_arguments_does_not_matter() -> None:
    from stub_driver import stub_driver

    from effnet_kernels.backends.triton import launch as seam

    with seam.capture_launches() as launches:
        bn_act_add(torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last), torch.randn(16))
    (launch,) = launches
    given = launch.arguments | launch.constants
    with stub_driver() as driver:
        for arguments in (given, given, dict(reversed(given.items()))):
            seam.launcher(launch.kernel)(launch.grid, **arguments)
        assert len(seam._handles) == 1
    first, second, third = driver.launched
    addressed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in first[9:]]
    assert [*second[9:]] == [*third[9:]] == addressed
    assert len(first) == len(third)


def test_tf32_follows_either_of_torchs_settings() -> None:
    result = run_python("""
import torch
from effnet_kernels.backends.triton.launch import dot_precision
seen = [dot_precision(torch.float32), dot_precision(torch.float16)]
torch.backends.cudnn.allow_tf32 = False
seen.append(dot_precision(torch.float32))
torch.backends.cudnn.conv.fp32_precision = "tf32"
seen.append(dot_precision(torch.float32))
torch.backends.cudnn.conv.fp32_precision = "ieee"
seen.append(dot_precision(torch.float32))
print(*seen)
""")
    assert result.stdout.split() == ["tf32", "ieee", "ieee", "tf32", "ieee"], result.stderr


def test_a_trace_takes_the_launches_of_its_own_thread_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from stub_driver import stub_driver

    from effnet_kernels.backends.triton.launch import capture_launches

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    with stub_driver() as driver, capture_launches() as launches, ThreadPoolExecutor(1) as pool:
        bn_act_add(x)
        pool.submit(bn_act_add, x).result()
        assert len(launches) == len(driver.launched) == 1


def test_a_first_launch_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from stub_driver import stub_driver

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    with stub_driver() as driver:
        bn_act_add(x)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        bn_act_add(x)
        with pytest.raises(RuntimeError, match="first launch before a CUDA graph is captured"):
            bn_act_add(x.half())
        assert len(driver.launched) == 2


def test_a_cached_launch_keeps_its_binary_loaded() -> None:
    """Triton unloads a binary when the object of it goes."""
    import gc
    import weakref

    from stub_driver import stub_driver

    from effnet_kernels.backends.triton import launch as seam
    from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel

    x = torch.randn(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    with stub_driver():
        bn_act_add(x)
        (handle,) = seam._handles.values()
        compiled = weakref.ref(handle[-1])
        del handle
        bn_act_add_kernel.device_caches.clear()
        gc.collect()
        assert compiled() is not None
