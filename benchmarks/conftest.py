"""Options of ``test_gpu.py``. Where launches are simulated, the simulator has to know our kernels' functions."""

from pathlib import Path

import pytest

from effnet_kernels.backends import triton


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks on a GPU")
    group.addoption("--gpu-cases", default="", metavar="REGEX", help="the cases whose names it finds; all")
    group.addoption("--gpu-contenders", default="", metavar="REGEX", help="the contenders beside ours; all")
    group.addoption("--gpu-seconds", type=float, metavar="N", help="after which nothing more is timed")
    path = Path(__file__).parents[1] / ".benchmarks" / "gpu.json"
    group.addoption("--gpu-json", type=Path, default=path, metavar="FILE", help="where results are kept")


@pytest.fixture(autouse=True, scope="session")
def _simulator() -> None:
    if triton.unavailable_reason() is None:
        from simulator import teach

        from effnet_kernels.backends.triton.launch import simulated

        if simulated():
            teach()
