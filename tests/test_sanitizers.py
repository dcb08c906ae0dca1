"""That scripts/sanitize sees what it looks for: a kernel that leaves its tensors ends the process with a report."""

import os
from pathlib import Path

import pytest
import torch
from native_cases import kernel_isas, sanitized_folder
from torch import Tensor

from effnet_kernels.backends.cpu.extension import extension

pytestmark = [
    pytest.mark.skipif(sanitized_folder is None, reason="needs the extension that scripts/sanitize builds"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

PIXELS, CHANNELS = 24 * 24, 40


def pooled(floats: int) -> Tensor:
    return torch.frombuffer(extension().PooledBytes(4 * floats), dtype=torch.float32).fill_(1)


@pytest.fixture
def report(capfd):
    """What a forked child has to say that calls channel_statistics() with these addresses; empty where it ends well."""

    def run(x: int, partials: int, isa: str | None = None) -> str:
        child = os.fork()
        if child == 0:
            extension().channel_statistics((1, PIXELS, 1, 1), CHANNELS, x, partials, 1, isa)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said = capfd.readouterr().err
        assert (status == 0) == (said == ""), said
        return said

    return run


def test_the_tests_have_the_sanitized_extension():
    assert sanitized_folder is not None
    assert Path(extension().__file__).is_relative_to(sanitized_folder)


@pytest.mark.parametrize("isa", kernel_isas())
@pytest.mark.parametrize("make", [torch.ones, pooled])
def test_the_end_of_a_map_that_is_read(report, make, isa):
    partials = torch.empty(3 * CHANNELS)
    whole, short = make(PIXELS * CHANNELS), make(PIXELS * CHANNELS - 1)
    assert report(whole.data_ptr(), partials.data_ptr(), isa) == ""
    assert "ERROR: AddressSanitizer" in report(short.data_ptr(), partials.data_ptr(), isa)


def test_the_beginning_of_a_map_that_is_read(report):
    x, partials = torch.ones(PIXELS * CHANNELS), torch.empty(3 * CHANNELS)
    assert "heap-buffer-overflow" in report(x.data_ptr() - 4, partials.data_ptr())


def test_the_end_of_a_tensor_that_is_written(report):
    x, partials = torch.ones(PIXELS * CHANNELS), torch.empty(3 * CHANNELS - 1)
    assert "heap-buffer-overflow" in report(x.data_ptr(), partials.data_ptr())


@pytest.mark.parametrize("make", [torch.ones, pooled])
def test_a_map_that_was_freed(report, make):
    address, partials = make(PIXELS * CHANNELS).data_ptr(), torch.empty(3 * CHANNELS)
    assert "heap-use-after-free" in report(address, partials.data_ptr())


def test_undefined_behaviour(report):
    x, partials = torch.ones(PIXELS * CHANNELS), torch.empty(3 * CHANNELS + 1)
    assert "runtime error: " in report(x.data_ptr(), partials.data_ptr() + 1)
