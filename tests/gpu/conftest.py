"""The device that the kernels' tests run on: a GPU, or Triton's IR executed on the CPU by ``ttsem``.

pytest tests/gpu                                   # on a machine with a GPU
python -m ttsem.sanitize pytest -n 2 tests/gpu     # on any other (Python >= 3.12, Triton 3.8), in two processes
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import simulator
import torch

from effnet_kernels.backends import triton
from effnet_kernels.backends.triton.configs import Target, device_target, use_target

REASON = triton.unavailable_reason()
# Without Triton there is nothing to import in these files; the header of the run says so.
collect_ignore_glob = [] if REASON is None else ["test_*.py"]
_SIMULATES = "EFFNET_KERNELS_TESTS_SIMULATE"


def simulated() -> bool:
    from effnet_kernels.backends.triton import launch

    return launch.simulated()


def pytest_report_header() -> str:
    return "tests/gpu: " + ("collected" if REASON is None else f"left out: {REASON}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None or simulated() or torch.cuda.is_available():
        return
    reason = "no GPU here: run these with `python -m ttsem.sanitize pytest -n 2 tests/gpu`"
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


class _Simulation:
    """A plugin with the simulator's state, as the simulator itself adds one where it starts pytest."""

    def __init__(self, state: Any) -> None:
        self.state = state


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes (``-n 2``) each has a simulator where the one that starts them has one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[_SIMULATES] = str(int(REASON is None and simulated()))
    elif os.environ.get(_SIMULATES) == "1":
        from ttsem import sanitize

        stack = contextlib.ExitStack()
        config.pluginmanager.register(_Simulation(stack.enter_context(sanitize.session(source="<pytest>"))))
        config.add_cleanup(stack.close)


def unchecked_for_races(config: pytest.Config) -> int:
    """How many launches of this process were so large that the simulator looked for no races in them."""
    states = (getattr(plugin, "state", None) for plugin in config.pluginmanager.get_plugins())
    return sum(getattr(state, "races_unchecked", 0) for state in states)


@pytest.fixture(autouse=True)
def _all_launches_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    before = unchecked_for_races(request.config)
    yield
    unchecked = unchecked_for_races(request.config) - before
    assert unchecked == 0, f"{unchecked} launches were too large for the simulator to look for races in them"


@pytest.fixture(autouse=True, scope="session")
def _device() -> Iterator[None]:
    if simulated():
        simulator.teach()
        torch.set_num_threads(1)
    # torch.empty then fills uninitialised memory with NaN, so that a test fails on elements that no kernel wrote.
    torch.use_deterministic_algorithms(True, warn_only=True)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
    torch.use_deterministic_algorithms(False)


def _device_of(multiprocessors: int) -> Target:
    if simulated():
        return Target("cuda", 90, multiprocessors)
    return device_target(torch.device("cuda"))._replace(multiprocessors=multiprocessors)


@pytest.fixture(autouse=True)
def _small_device() -> Iterator[None]:
    """Configurations as for a GPU of four multiprocessors, so that programs of small tests walk over several tiles."""
    with use_target(_device_of(4)):
        yield


@pytest.fixture(params=[4, 132])
def multiprocessors(request: pytest.FixtureRequest) -> Iterator[int]:
    """As for a GPU that these maps fill, and for one that they leave idle; a test asks for it where rules differ."""
    with use_target(_device_of(request.param)):
        yield request.param
