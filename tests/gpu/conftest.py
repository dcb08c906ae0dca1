"""The device that the kernels' tests run on: a GPU, or Triton's IR executed on the CPU by ``ttsem``.

pytest tests/gpu                              # on a machine with a GPU
python -m ttsem.sanitize pytest tests/gpu     # on any other (Python >= 3.12, Triton 3.8)
"""

from collections.abc import Iterator

import pytest
import simulator
import torch

from effnet_kernels.backends import triton
from effnet_kernels.backends.triton.configs import Target, device_target, use_target

REASON = triton.unavailable_reason()
# Without Triton there is nothing to import in these files; the header of the run says so.
collect_ignore_glob = [] if REASON is None else ["test_*.py"]


def simulated() -> bool:
    from effnet_kernels.backends.triton import launch

    return launch.simulated()


def pytest_report_header() -> str:
    return "tests/gpu: " + ("collected" if REASON is None else f"left out: {REASON}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None or simulated() or torch.cuda.is_available():
        return
    reason = "no GPU here: run these with `python -m ttsem.sanitize pytest tests/gpu`"
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run in which the simulator found a launch too large to be checked for races; its summary counts them."""
    for plugin in session.config.pluginmanager.get_plugins():
        if getattr(getattr(plugin, "state", None), "races_unchecked", 0):
            session.exitstatus = 1


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


@pytest.fixture(autouse=True)
def _small_device() -> Iterator[None]:
    """Configurations as for a GPU of four multiprocessors, so that programs of small tests walk over several tiles."""
    target = Target("cuda", 90, 4)
    if not simulated():
        target = device_target(torch.device("cuda"))._replace(multiprocessors=4)
    with use_target(target):
        yield
