"""The pointwise convolution's kernels, forward and backward."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.backends.triton import pointwise
from effnet_kernels.backends.triton.batch_norm import merge_statistics
from effnet_kernels.backends.triton.launch import record_launches
from effnet_kernels.fusion.spec import (
    ACTIVATIONS,
    SUMS_OF_GRADIENT,
    Epilogue,
    OutputGradient,
    Prologue,
    RunningStatistics,
)
from gpu.compare import assert_accurate, cast, channels_last, compare, moments


class Case(NamedTuple):
    """Samples, channels in and out, map; maps that are one or several tiles, with ragged edges."""

    samples: int
    inputs: int
    outputs: int
    height: int
    width: int
    dtype: torch.dtype

    def x(self) -> Tensor:
        return channels_last(self.samples, self.inputs, self.height, self.width, dtype=self.dtype)

    def y(self) -> Tensor:
        return channels_last(self.samples, self.outputs, self.height, self.width, dtype=self.dtype)

    def weight(self) -> Tensor:
        return torch.randn(self.outputs, self.inputs, 1, 1, device="cuda") / self.inputs**0.5


CASES = [
    Case(3, 24, 40, 15, 17, torch.float32),
    Case(1, 16, 96, 28, 28, torch.float16),
    Case(3, 112, 24, 7, 7, torch.bfloat16),
    Case(1, 40, 112, 4, 112, torch.float32),
    Case(3, 7, 33, 7, 7, torch.float32),
    Case(1, 1152, 16, 7, 7, torch.float16),
    Case(3, 96, 1152, 5, 5, torch.float32),
]
SMALL = [CASES[0], CASES[1], CASES[2], CASES[4]]
ids = [f"{c.samples}x{c.inputs}-{c.outputs}x{c.height}x{c.width}-{str(c.dtype)[6:]}" for c in CASES]
small_ids = [ids[CASES.index(c)] for c in SMALL]


def vector(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def full_prologue(case: Case, act: str = "silu") -> Prologue:
    gate = torch.rand(case.samples, case.inputs, device="cuda")
    return Prologue(vector(case.inputs).abs() + 0.5, vector(case.inputs), act, gate)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_training_forward(case: Case) -> None:
    x, weight, bias = case.x(), case.weight(), vector(case.outputs)
    for prologue in (Prologue(), full_prologue(case)):
        arguments = (x, weight, bias, prologue, Epilogue(), "statistics")
        y, partials = pointwise.pointwise_conv(*arguments)
        compare(y, lambda *a: reference.pointwise_conv(*a)[0], *arguments, dtype=case.dtype)
        # Statistics are those of the values as they were stored.
        assert_accurate(merge_statistics(partials), moments(y))


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_inference_forward(case: Case) -> None:
    x, weight = case.x(), case.weight()
    statistics = RunningStatistics(vector(case.outputs), vector(case.outputs).abs() + 0.5, 1e-3)
    epilogue = Epilogue(vector(case.outputs), vector(case.outputs), "silu", None, statistics)
    gate = torch.rand(case.samples, case.inputs, device="cuda")
    for arguments in (
        (x, weight, None, Prologue(), epilogue, "none"),
        (x, weight, None, Prologue(gate=gate), epilogue._replace(act="none", residual=case.y()), "none"),
    ):
        compare(pointwise.pointwise_conv(*arguments), reference.pointwise_conv, *arguments, dtype=case.dtype)
    arguments = (x, weight, None, Prologue(), epilogue, "pool")
    y, sums = pointwise.pointwise_conv(*arguments)
    compare((y, sums.sum(dim=1, keepdim=True)), reference.pointwise_conv, *arguments, dtype=case.dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    case = SMALL[0]
    prologue = full_prologue(case, act)
    arguments = (case.x(), case.weight(), None, prologue, Epilogue(None, vector(case.outputs), act), "none")
    compare(pointwise.pointwise_conv(*arguments), reference.pointwise_conv, *arguments, dtype=case.dtype)


def gradients(case: Case) -> dict[str, OutputGradient]:
    """The gradients that a project, an expand and a pooling head get in training, and all parts at once."""
    grad, y, coefficients = case.y(), case.y(), vector(3, case.outputs)
    drop_path_scale = torch.rand(case.samples, device="cuda")
    offset, gate = vector(case.samples, case.outputs), torch.rand(case.samples, case.outputs, device="cuda")
    scale, shift = vector(case.outputs).abs(), vector(case.outputs)
    return {
        "project": OutputGradient(grad, y, coefficients, drop_path_scale=drop_path_scale),
        "expand": OutputGradient(grad, y, coefficients),
        "head": OutputGradient(None, y, coefficients, offset=offset, scale=scale, shift=shift, act="silu"),
        "all": OutputGradient(grad, y, coefficients, gate, drop_path_scale, offset, scale, shift, "hardswish"),
    }


@pytest.mark.parametrize("kind", ["project", "expand", "head", "all"])
@pytest.mark.parametrize("case", SMALL, ids=small_ids)
def test_data_gradient(case: Case, kind: str) -> None:
    gradient, weight, x, prologue = gradients(case)[kind], case.weight(), case.x(), full_prologue(case)
    mean = vector(case.inputs)
    variants = {
        "project": (gradient, weight, x, prologue, mean, None, False),
        "expand": (gradient, weight, x, Prologue(), None, case.x(), False),
        "head": (gradient, weight, x, Prologue(), None, None, False),
        "all": (gradient, weight, x, prologue, mean, None, True),
    }
    arguments = (*variants[kind], True, False)
    dx, sums, _ = pointwise.pointwise_conv_backward(*arguments)
    sums = None if sums is None else sums.sum(dim=1, keepdim=True)

    def of_gradient(*arguments) -> tuple[Tensor | None, ...]:
        """The reference, without the sums of the slopes, which the forward pass makes here."""
        dx, sums, dweight = reference.pointwise_conv_backward(*arguments)
        return dx, None if sums is None else sums[:, :, SUMS_OF_GRADIENT], dweight

    compare((dx, sums, None), of_gradient, *arguments, dtype=case.dtype)


@pytest.mark.parametrize("kind", ["project", "expand", "head", "all"])
@pytest.mark.parametrize("case", SMALL, ids=small_ids)
def test_weight_gradient(case: Case, kind: str) -> None:
    prologue = full_prologue(case) if kind in ("project", "all") else Prologue()
    arguments = (gradients(case)[kind], case.weight(), case.x(), prologue, None, None, False, False, True)
    actual = pointwise.pointwise_conv_backward(*arguments)
    compare(actual, reference.pointwise_conv_backward, *arguments, dtype=case.dtype)


def test_statistics_of_a_large_mean_keep_their_digits() -> None:
    """E[x^2] - E[x]^2 in float32 would have none left at a mean of a thousand deviations."""
    case = SMALL[0]
    bias = torch.full((case.outputs,), 1000.0, device="cuda")
    y, partials = pointwise.pointwise_conv(case.x(), case.weight(), bias, Prologue(), Epilogue(), "statistics")
    _, mean, m2 = merge_statistics(partials)
    right = moments(y)
    assert_accurate(mean, right[1])
    assert ((m2 - right[2]).abs() <= 1e-4 * right[2]).all()


def test_tf32_follows_torchs_setting() -> None:
    case = SMALL[0]
    arguments = (case.x(), case.weight(), None, Prologue(), Epilogue(), "none")
    right = reference.pointwise_conv(*cast(arguments, torch.float64))[0]
    torch.backends.cudnn.allow_tf32 = True
    try:
        rounded = pointwise.pointwise_conv(*arguments)[0]
    finally:
        torch.backends.cudnn.allow_tf32 = False
    error = float((rounded - right).norm() / right.norm())
    assert 1e-5 < error < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_gradients_of_few_outputs(dtype: torch.dtype) -> None:
    """The output's gradient is formed once, as a map, where many blocks of channels would form it on load."""
    case = Case(2, 256, 24, 5, 7, dtype)
    gradient, weight, x, prologue = gradients(case)["project"], case.weight(), case.x(), full_prologue(case)
    arguments = (gradient, weight, x, prologue, vector(case.inputs), None, True, True, True)
    with record_launches() as launches:
        dx, sums, dweight = pointwise.pointwise_conv_backward(*arguments)
    assert launches[0].kernel.__name__ == "apply_gradient_kernel"
    actual = dx, sums.sum(dim=1, keepdim=True), dweight
    compare(actual, reference.pointwise_conv_backward, *arguments, dtype=dtype)
    alone = pointwise.pointwise_conv_backward(*arguments[:-1], False)[0]
    assert_accurate(dx, alone.double(), alone if dtype != torch.float32 else None)
