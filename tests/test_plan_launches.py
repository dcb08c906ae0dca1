"""Launches by the extension, beside those of Triton's own launchers, on drivers that launch nothing."""

import ctypes
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python

from effnet_kernels.backends import cpu, triton
from effnet_kernels.backends.cpu.extension import extension

POINTERS = ctypes.POINTER(ctypes.c_void_p)
LAUNCH_KERNEL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *(ctypes.c_uint,) * 7, ctypes.c_void_p, POINTERS, ctypes.c_void_p
)
GET_CURRENT = ctypes.CFUNCTYPE(ctypes.c_int, POINTERS)
SET_CURRENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
RETAIN = ctypes.CFUNCTYPE(ctypes.c_int, POINTERS, ctypes.c_int)
DEVICE = 3

needs_extension = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")


class Driver:
    """A driver's functions, of which ``cuLaunchKernel`` notes its arguments and returns ``error``."""

    def __init__(self, parameters: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.error = 0
        # By thread.
        self.contexts: dict[int, int] = {}

        def launch(function: int, *rest: Any) -> int:
            *sizes, stream, pointers, _ = rest
            values = [ctypes.c_uint64.from_address(pointers[i]).value for i in range(parameters)]
            self.rows.append({"function": function, "sizes": tuple(sizes), "stream": stream, "values": values})
            return self.error if threading.get_ident() in self.contexts else 201

        def get_current(context: Any) -> int:
            context[0] = self.contexts.get(threading.get_ident())
            return 0

        def set_current(context: int) -> int:
            self.contexts[threading.get_ident()] = context
            return 0

        def retain(context: Any, device: int) -> int:
            context[0] = 1000 + device
            return 0

        self.functions = LAUNCH_KERNEL(launch), GET_CURRENT(get_current), SET_CURRENT(set_current), RETAIN(retain)

    def launches(self, rows: list[Any]) -> Any:
        addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in self.functions)
        return extension().Launches(addresses, DEVICE, rows)


@needs_extension
def test_launches_have_their_sizes_values_and_addresses() -> None:
    driver = Driver(parameters=3)
    launches = driver.launches(
        [
            ("one", 0x10, (5, 6, 7), 128, 1024, [(1, 0), (-1, 3), (0, 16)]),
            ("two", 2**40, (1, 1, 2**16 - 1), 32, 0, [(-1, 2**64 - 1), (0, 0), (1, 2**33)]),
        ]
    )
    for first in (2**47, 256):
        driver.rows.clear()
        launches.run(77, [first, 1024])
        assert driver.rows == [
            {"function": 0x10, "sizes": (5, 6, 7, 128, 1, 1, 1024), "stream": 77, "values": [1024, 3, first + 16]},
            {
                "function": 2**40,
                "sizes": (1, 1, 2**16 - 1, 32, 1, 1, 0),
                "stream": 77,
                "values": [2**64 - 1, first, 2**33 + 1024],
            },
        ]


@needs_extension
def test_a_launch_that_fails_is_named_and_the_last() -> None:
    driver = Driver(parameters=1)
    launches = driver.launches([(name, 1, (1, 1, 1), 32, 0, [(-1, 0)]) for name in ("one", "two")])
    driver.error = 719
    with pytest.raises(RuntimeError, match=r"^one: cuLaunchKernel failed with CUDA error 719$"):
        launches.run(0, [])
    assert len(driver.rows) == 1


@needs_extension
def test_an_address_that_is_missing_is_an_error() -> None:
    driver = Driver(parameters=1)
    launches = driver.launches([("one", 1, (1, 1, 1), 32, 0, [(2, 0)])])
    with pytest.raises(IndexError):
        launches.run(0, [1, 2])
    assert not driver.rows


@needs_extension
def test_a_thread_without_a_context_gets_that_of_the_device() -> None:
    driver = Driver(parameters=0)
    launches = driver.launches([("one", 1, (1, 1, 1), 32, 0, [])])
    threads = [threading.Thread(target=launches.run, args=(0, [])) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(driver.rows) == 2
    assert set(driver.contexts.values()) == {1000 + DEVICE}
    # Another context that is current stays so.
    driver.contexts[threading.get_ident()] = 7
    launches.run(0, [])
    assert driver.contexts[threading.get_ident()] == 7


def test_values_are_packed_as_a_kernel_reads_them() -> None:
    from effnet_kernels.backends.triton.plan_launches import _TYPES, Parameter, _packed

    for type_, value in [("i32", -5), ("i32", 2**31 - 1), ("i64", -(2**40)), ("fp32", 1e-3), ("fp32", -0.0)]:
        base, bits = _packed(Parameter(value), _TYPES[type_][1])
        assert base == -1
        read = {"i32": "<i", "i64": "<q", "fp32": "<f"}[type_]
        expected = struct.unpack("<f", struct.pack("<f", value))[0] if type_ == "fp32" else value
        assert struct.unpack_from(read, struct.pack("<Q", bits))[0] == expected
    with pytest.raises(struct.error):
        _packed(Parameter(2**31), _TYPES["i32"][1])


# Every launch of a few blocks' plans, by both ways, with the same addresses: what the driver gets is compared.
COMPARE = """
import ctypes, gc, pathlib, sys, threading, weakref
sys.path.insert(0, {benchmarks!r})
from stub_driver import NullDriver, models_on
driver = NullDriver(pathlib.Path({folder!r}))
import torch
from torch import nn
from effnet_kernels.backends.triton import plan_launches, plans
from effnet_kernels.modules import MBConvConfig

seen, sizes_of, recorded = [], {{}}, []
WIDTHS = {{"u32": 4, "f32": 4, "u64": 8}}

UINTS, POINTERS = ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)

@ctypes.CFUNCTYPE(None, ctypes.c_void_p, UINTS, ctypes.c_void_p, POINTERS)
def observe(function, sizes, stream, parameters):
    values = [ctypes.string_at(parameters[i], n) for i, n in enumerate(sizes_of.get(function, ()))]
    seen.append((function, tuple(sizes[:7]), stream, values))

def compared(launches):
    for _, handle, _ in launches:
        declared = plan_launches._declared_types(handle[4].asm["ptx"])
        sizes_of[handle[2]] = [WIDTHS[type_] for type_ in declared]
    recorded.extend(weakref.ref(t) for launch, *_ in launches for t in launch.arguments.values() if torch.is_tensor(t))
    native = run_of(launches)
    assert isinstance(native, plan_launches.ByExtension)
    addresses = [256 * (i + 1) for i in range(64)]
    by_triton, rows = plan_launches.ByTriton(launches), []
    # In a new thread no context is current.
    in_thread = lambda *arguments: [(t := threading.Thread(target=native, args=arguments)).start(), t.join()]
    for run in (by_triton, native, in_thread):
        seen.clear()
        run(99, addresses)
        rows.append(list(seen))
    assert len(rows[0]) == len(launches) and all(row[3] for row in rows[0])
    assert rows[0] == rows[1] == rows[2], rows
    print(len(launches), "launches")
    return native

run_of = plan_launches.run_of
plans.run_of = compared
driver.libcuda.observe(observe)
with models_on(driver):
    for config in (MBConvConfig(6, 3, 1, 16, 16, 1), MBConvConfig(1, 5, 2, 16, 24, 1)):
        module = config.block(config, 0.2, nn.BatchNorm2d)
        for dtype in (torch.float16, torch.float32):
            x = torch.randn(2, 16, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            for _ in range(3):
                y = module.train()(x)
                y.backward(torch.ones_like(y))
            with torch.no_grad():
                for _ in range(3):
                    module.eval()(x)
        gc.collect()
        # A plan holds no tensor of the pass that it was recorded from.
        assert len(recorded) > 100 and not any(ref() is not None for ref in recorded)
        recorded.clear()
"""


@needs_extension
@pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler, with which Triton builds its launchers")
def test_the_driver_gets_what_tritons_launchers_give_it(tmp_path: Path) -> None:
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    code = COMPARE.format(benchmarks=benchmarks, folder=str(tmp_path))
    result = run_python(code, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("launches") == 12, result.stdout
