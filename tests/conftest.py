"""What the tests share: tolerances, and comparisons by them."""

import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Relative RMS error allowed against the reference; a test that needs another says why in a comment.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


# For tests of what torch.compile makes of the operators.
TRACES_OPERATORS = torch.__version__ >= (2, 11)
traces_operators = pytest.mark.skipif(not TRACES_OPERATORS, reason="before torch 2.11 the eager path is compiled")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=800, help="how many random blocks tests/test_surgery.py tries")


def pytest_configure() -> None:
    """Of several processes (``pytest -n``) each gets its share of the processor, and so do those that it starts.

    Threads of torch that wait for one another spin, which takes several times as long where they share a core.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        threads = max(torch.get_num_threads() // processes, 1)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``."""
    difference, expected = actual.detach().double() - expected.detach().double(), expected.detach().double()
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Same shape and dtype, finite where expected, and within the dtype's tolerance."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = relative_rms(actual, expected)
    assert error <= (TOLERANCES[expected.dtype] if tolerance is None else tolerance), f"relative RMS error {error:.2e}"


def assert_gradients_close(actual: nn.Module, expected: nn.Module) -> None:
    """Every parameter's gradient to |d| <= 1e-3 |g| + 1e-5 max|g|, the maximum over the model.

    Some BatchNorm biases have a true gradient of zero, so that a purely relative bound would test rounding. BatchNorms
    of few values a channel magnify it, so that whole networks need up to 6e-4 of the first term.
    """
    largest = max(float(p.grad.abs().max()) for p in expected.parameters() if p.grad is not None)
    for (name, p), q in zip(expected.named_parameters(), actual.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            excess = ((q.grad - p.grad).abs() - 1e-3 * p.grad.abs() - 1e-5 * largest).max()
            assert excess <= 0, f"{name}: {float(excess):.2e} over the bound, largest gradient {largest:.2e}"


def assert_buffers_close(actual: nn.Module, expected: nn.Module, tolerance: float = TOLERANCES[torch.float32]) -> None:
    """Running statistics within a part of the standard deviation (means) or of themselves (variances), counts exactly.

    A mean near zero is the rounding of its terms, so that it is measured by their spread.
    """
    ours = dict(actual.named_buffers())
    for name, buffer in expected.named_buffers():
        if name.endswith("running_mean"):
            spread = expected.get_buffer(name.replace("running_mean", "running_var")).sqrt()
            assert ((ours[name] - buffer).abs() <= tolerance * (spread + buffer.abs())).all(), name
        elif name.endswith("running_var"):
            assert ((ours[name] - buffer).abs() <= tolerance * buffer.abs()).all(), name
        else:
            assert torch.equal(ours[name], buffer), name


def copies(module: nn.Module) -> list[nn.Module]:
    """Deeply copied, pickled, and saved and loaded."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm random weights and running statistics, so that nothing is hidden behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            tensors: Iterable[tuple[Tensor | None, float, float]] = (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            )
            for tensor, low, high in tensors:
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def calibrate(model: nn.Module, size: int = 64) -> nn.Module:
    """Random BatchNorms whose running statistics are those of random images; the model, in eval mode.

    With others, outputs hardly depend on the image, and hide what is computed otherwise.
    """
    norms = [module for module in randomize(model).modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def importing_alike(folder: str | os.PathLike[str], **environment: str) -> dict[str, Any]:
    """Arguments of a subprocess whose Python imports the modules of this one.

    It starts in a folder that has none: from the repository's root it would import the source tree, where no extension
    is.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {"cwd": folder, "env": {**os.environ, "PYTHONPATH": path, **environment}}


def run_python(code: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with the modules of this one importable."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", code],
            **importing_alike(folder, **environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(autouse=True)
def _deterministic_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small convolutions in torch spend longer starting threads than computing, and far longer on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
