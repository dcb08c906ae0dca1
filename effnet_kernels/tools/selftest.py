"""The fused network against eager PyTorch on this machine's GPU: outputs, gradients, statistics, and speed."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import select
from effnet_kernels.backends.select import Backend
from effnet_kernels.interop.verification import without_tf32
from effnet_kernels.tools import timing
from effnet_kernels.tools.warmup import Step, compile_steps


class Check(NamedTuple):
    """A relative RMS error, and the largest that is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


class Speed(NamedTuple):
    """Medians in milliseconds of a step of ``batch`` images."""

    name: str
    batch: int
    ours: float
    eager: float

    @property
    def ratio(self) -> float:
        return self.eager / self.ours


class Report(NamedTuple):
    device: dict[str, str]
    checks: list[Check]
    speeds: list[Speed]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "passed": self.passed,
            "checks": [{**check._asdict(), "passed": check.passed} for check in self.checks],
            "speeds": [{**speed._asdict(), "ratio": speed.ratio} for speed in self.speeds],
        }

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.device.items()]
        lines += ["", "error against eager PyTorch in float64 (relative RMS)"]
        for check in self.checks:
            verdict = "ok" if check.passed else "FAILED"
            lines.append(f"  {check.name:<44}{check.error:9.1e}  allowed {check.allowed:7.1e}  {verdict}")
        lines += ["", "speed against eager PyTorch in channels-last, the same precision (medians)"]
        for speed in self.speeds:
            images = 1e3 * speed.batch / speed.ours
            lines.append(
                f"  {speed.name:<30}{speed.ours:9.2f} ms  eager {speed.eager:9.2f} ms  {speed.ratio:5.2f}x  "
                f"{images:9.0f} images/s"
            )
        return "\n".join(lines)


def selftest(make: Callable[[], nn.Module], resolution: int = 224, batch: int = 64, rounds: int = 10) -> Report:
    """Compares the network that ``make`` returns on the Triton kernels with itself as torch computes it.

    Errors are measured on four images, speed on ``batch``. Raises BackendError where the kernels cannot run.
    """
    with select.use_backend("triton"):
        from effnet_kernels.backends.triton.launch import simulated
    with without_tf32():
        torch.manual_seed(0)
        model = make().cuda()
        if not simulated():
            _compile(model, resolution, batch)
        x = torch.randn(4, 3, resolution, resolution, device="cuda").contiguous(memory_format=torch.channels_last)
        checks = [*_check_inference(model, x), *_check_training(model, x)]
    x = torch.randn(batch, 3, resolution, resolution, device="cuda").contiguous(memory_format=torch.channels_last)
    return Report(_device(), checks, [_time_inference(model, x, rounds), _time_training(model, x, rounds)])


def _compile(model: nn.Module, resolution: int, batch: int) -> None:
    """All kernels at once in parallel, rather than one by one as they are met."""
    few, many = (4, 3, resolution, resolution), (batch, 3, resolution, resolution)
    half = copy.deepcopy(model).half()
    compile_steps(
        [
            Step(model, few),
            Step(model, few, train=False),
            Step(half, few, train=False),
            Step(half, many, train=False),
            Step(model, many, dtype=torch.float16),
        ]
    )


def _device() -> dict[str, str]:
    import triton

    from effnet_kernels import __version__

    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "GPU": f"{torch.cuda.get_device_name()}, compute capability {facts.major}.{facts.minor}",
        "versions": f"effnet_kernels {__version__}, torch {torch.__version__}, triton {triton.__version__}",
    }


def _check_inference(model: nn.Module, x: Tensor) -> list[Check]:
    model = copy.deepcopy(model).eval()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = _run("torch", exact, x.double())
        half, half_x = copy.deepcopy(model).half(), x.half()
        eager = _error(_run("torch", half, half_x), expected)
        return [
            Check("inference, float32: outputs", _error(_run("triton", model, x), expected), 1e-5),
            Check("inference, float16: outputs", _error(_run("triton", half, half_x), expected), 2 * eager + 1e-3),
        ]


def _check_training(model: nn.Module, x: Tensor) -> list[Check]:
    models = {"exact": copy.deepcopy(model).double().train(), "ours": copy.deepcopy(model).train()}
    outputs = {}
    backends: dict[str, Backend] = {"exact": "torch", "ours": "triton"}
    for name, backend in backends.items():
        torch.manual_seed(1)  # the same dropout and stochastic depth
        outputs[name] = _run(backend, models[name], x.double() if name == "exact" else x)
        outputs[name].square().mean().backward()
    gradients = {
        name: torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None])
        for name, m in models.items()
    }
    statistics = {
        name: torch.cat([b.double().flatten() for key, b in m.named_buffers() if key.endswith("running_var")])
        for name, m in models.items()
    }
    return [
        Check(f"training, float32: {what}", _error(values["ours"], values["exact"]), bound)
        for what, values, bound in (
            ("outputs", outputs, 1e-4),
            ("all gradients", gradients, 1e-3),
            ("running variances", statistics, 1e-5),
        )
    ]


def _time_inference(model: nn.Module, x: Tensor, rounds: int) -> Speed:
    model = copy.deepcopy(model).eval().half().to(memory_format=torch.channels_last)
    x = x.half()
    with torch.no_grad():
        return _speed("inference, float16", x, rounds, lambda backend: _run(backend, model, x))


def _time_training(model: nn.Module, x: Tensor, rounds: int) -> Speed:
    model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)

    def step(backend: Backend) -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = _run(backend, model, x).float().square().mean()
        loss.backward()

    return _speed("training, autocast float16", x, rounds, step)


def _speed(name: str, x: Tensor, rounds: int, call: Callable[[Backend], object]) -> Speed:
    found = timing.medians(
        timing.interleaved({"ours": lambda: call("triton"), "eager": lambda: call("torch")}, rounds, warm=3)
    )
    return Speed(name, x.shape[0], found["ours"], found["eager"])


def _run(backend: Backend, model: nn.Module, x: Tensor) -> Tensor:
    with select.use_backend(backend):
        return model(x)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
