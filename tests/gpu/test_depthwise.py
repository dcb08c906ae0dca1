"""The depthwise convolution's kernels, forward and backward."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from effnet_kernels.backends.reference import primitives as reference
from effnet_kernels.backends.triton import depthwise
from effnet_kernels.backends.triton.batch_norm import merge_statistics
from effnet_kernels.fusion.geometry import same_padding
from effnet_kernels.fusion.spec import ACTIVATIONS, Epilogue, OutputGradient, Prologue, RunningStatistics
from gpu.compare import assert_accurate, channels_last, compare, moments


class Case(NamedTuple):
    samples: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int | str
    dtype: torch.dtype

    def x(self) -> Tensor:
        return channels_last(self.samples, self.channels, self.height, self.width, dtype=self.dtype)

    def weight(self) -> Tensor:
        return torch.randn(self.channels, 1, self.kernel, self.kernel, device="cuda") / self.kernel

    def pads(self) -> tuple[int, int, int, int]:
        if isinstance(self.padding, int):
            return (self.padding,) * 4
        return same_padding(self.height, self.width, self.kernel, self.stride)


CASES = [
    Case(3, 24, 15, 17, 3, 1, 1, torch.float32),
    Case(1, 16, 16, 13, 5, 2, "same", torch.float16),
    Case(3, 40, 7, 8, 3, 2, "same", torch.bfloat16),
    Case(3, 112, 7, 7, 5, 1, 2, torch.float32),
    Case(1, 96, 4, 112, 3, 2, 1, torch.float32),
    Case(1, 12, 7, 9, 7, 1, 3, torch.float32),
    Case(1, 9, 8, 9, 7, 2, "same", torch.float32),
    Case(1, 24, 28, 28, 3, 1, 1, torch.float16),
    Case(1, 7, 15, 9, 5, 2, 2, torch.float32),
    Case(3, 16, 9, 8, 3, 1, 0, torch.float32),
    # More padding than kernel: the first output rows read nothing else.
    Case(1, 8, 5, 6, 3, 1, 3, torch.float32),
    Case(2, 8, 5, 6, 3, 1, 4, torch.float32),
    Case(1, 8, 5, 6, 5, 2, 6, torch.float32),
]
ids = [
    f"{c.samples}x{c.channels}x{c.height}x{c.width}-k{c.kernel}s{c.stride}p{c.padding}-{c.dtype}".replace("torch.", "")
    for c in CASES
]


def vector(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


@pytest.mark.parametrize("case", [*CASES, Case(1, 1152, 7, 7, 5, 1, 2, torch.float16)], ids=[*ids, "1152 channels"])
def test_training_forward(case: Case) -> None:
    prologue = Prologue(vector(case.channels).abs() + 0.5, vector(case.channels), "silu")
    arguments = (case.x(), case.weight(), case.stride, case.pads(), prologue, Epilogue(), "statistics")
    y, partials = depthwise.depthwise_conv(*arguments)
    compare(y, lambda *a: reference.depthwise_conv(*a)[0], *arguments, dtype=case.dtype)
    assert_accurate(merge_statistics(partials), moments(y))


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_inference_forward(case: Case) -> None:
    statistics = RunningStatistics(vector(case.channels), vector(case.channels).abs() + 0.5, 1e-3)
    epilogue = Epilogue(vector(case.channels), vector(case.channels), "silu", None, statistics)
    arguments = (case.x(), case.weight(), case.stride, case.pads(), Prologue(), epilogue, "pool")
    y, sums = depthwise.depthwise_conv(*arguments)
    compare((y, sums.sum(dim=1, keepdim=True)), reference.depthwise_conv, *arguments, dtype=case.dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    """The padding is of zeros after the activation, whatever the activation makes of the shift."""
    case = CASES[0]
    prologue = Prologue(vector(case.channels), vector(case.channels) + 1.0, act)
    arguments = (case.x(), case.weight(), 1, case.pads(), prologue, Epilogue(None, vector(case.channels), act), "none")
    compare(depthwise.depthwise_conv(*arguments), reference.depthwise_conv, *arguments, dtype=case.dtype)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_backward(case: Case) -> None:
    x, weight, pads, channels = case.x(), case.weight(), case.pads(), case.channels
    y, _ = depthwise.depthwise_conv(x, weight, case.stride, pads, Prologue(), Epilogue(), "none")
    grad = torch.randn(y.shape, device="cuda").to(y).contiguous(memory_format=torch.channels_last)
    gate, offset = torch.rand(case.samples, channels, device="cuda"), vector(case.samples, channels)
    gradient = OutputGradient(
        grad, y, vector(3, channels), gate, None, offset, vector(channels).abs(), vector(channels), "silu"
    )
    prologue = Prologue(vector(channels).abs() + 0.5, vector(channels), "silu")
    arguments = (gradient, x, weight, case.stride, pads, prologue, vector(channels), None)
    dz, sums, dweight = depthwise.depthwise_conv_backward(*arguments)
    compare(
        (dz, sums.sum(dim=0, keepdim=True), dweight), reference.depthwise_conv_backward, *arguments, dtype=case.dtype
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=ids[:2])
def test_backward_of_an_activated_input(case: Case) -> None:
    """As in a block that does not expand: the residual's gradient is added to the input's."""
    x, weight, pads = case.x(), case.weight(), case.pads()
    y, _ = depthwise.depthwise_conv(x, weight, case.stride, pads, Prologue(), Epilogue(), "none")
    grad = torch.randn(y.shape, device="cuda").to(y).contiguous(memory_format=torch.channels_last)
    arguments = (OutputGradient(grad, y), x, weight, case.stride, pads, Prologue(), None, case.x())
    actual = depthwise.depthwise_conv_backward(*arguments)
    compare(actual, reference.depthwise_conv_backward, *arguments, dtype=case.dtype)


def test_statistics_of_a_large_mean_keep_their_digits() -> None:
    case = Case(2, 16, 15, 17, 3, 1, 0, torch.float32)
    y, partials = depthwise.depthwise_conv(
        case.x() + 1000.0, case.weight().abs(), 1, case.pads(), Prologue(), Epilogue(), "statistics"
    )
    _, mean, m2 = merge_statistics(partials)
    right = moments(y)
    assert_accurate(mean, right[1])
    assert ((m2 - right[2]).abs() <= 1e-4 * right[2]).all()


def test_maps_in_which_the_kernels_cannot_count_are_refused() -> None:
    x = torch.empty(1, 8, 2**14, 2**14, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(8, 1, 3, 3, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 values an image"):
        depthwise.depthwise_conv(x, weight, 1, (1, 1, 1, 1), Prologue(), Epilogue(), "none")
