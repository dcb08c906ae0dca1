"""The debt that an activation carries between two convolutions.

A convolution of this package reads the raw output ``x`` of the convolution before it, and what is still owed to it::

    a[n, c, h, w] = act(scale[c] * x[n, c, h, w] + shift[c]) * gate[n, c]

``scale`` and ``shift`` are BatchNorm, ``gate`` is squeeze-and-excitation. The consumer pays the debt while it loads
(:class:`Prologue`); at inference, where the statistics are known beforehand, the producer pays it before it stores
(:class:`Epilogue`).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["none", "silu", "relu", "relu6", "hardswish"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "silu", "relu", "relu6", "hardswish")

Gate = Literal["sigmoid", "hardsigmoid"]
"""How squeeze-and-excitation makes its gate of a number; the hard one is ``relu6(z + 3) / 6``."""
GATES: tuple[Gate, ...] = ("sigmoid", "hardsigmoid")

Padding = tuple[int, int, int, int]
"""Zeros added on the (left, right, top, bottom), in the order of ``torch.nn.functional.pad``."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, statistics and vectors are kept in: fp64 for maps in fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RunningStatistics(NamedTuple):
    """What BatchNorm normalises by at inference. Beside it, ``scale`` and ``shift`` are BatchNorm's weight and bias."""

    mean: Tensor  # [C], fp32
    var: Tensor  # [C], fp32
    eps: float


class Prologue(NamedTuple):
    """What is owed to an input, paid on load: ``act(scale * x + shift) * gate``. Any part may be absent."""

    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"
    gate: Tensor | None = None  # [N, C], fp32
    statistics: RunningStatistics | None = None


class Epilogue(NamedTuple):
    """What is applied to an output before it is stored: ``act(scale * y + shift) + residual``."""

    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"
    residual: Tensor | None = None  # [N, C, H, W], the output's dtype
    statistics: RunningStatistics | None = None


class OutputGradient(NamedTuple):
    """The gradient of a convolution's raw output ``y``, formed on load::

        dz = (grad * gate[n, c] * keep[n] + offset[n, c]) * act'(scale[c] * y + shift[c])
        dy = alpha[c] * dz + beta[c] * y + gamma[c]

    ``dz`` is the gradient of BatchNorm's output, and ``coefficients`` are BatchNorm's backward. Any part may be absent:
    a grad is then 0, a factor 1, an offset 0, and without coefficients dy is dz.
    """

    grad: Tensor | None  # [N, C, H, W], the maps' dtype
    y: Tensor | None = None  # [N, C, H, W], the maps' dtype
    coefficients: Tensor | None = None  # [3, C], fp32: alpha, beta, gamma
    gate: Tensor | None = None  # [N, C], fp32
    keep: Tensor | None = None  # [N], fp32
    offset: Tensor | None = None  # [N, C], fp32
    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"

    def by_sample(self) -> bool:
        """Whether samples differ in more than their maps."""
        return self.gate is not None or self.keep is not None or self.offset is not None


Reduction = Literal["none", "statistics", "pool"]
"""What a convolution returns beside its output: nothing, the [3, C] statistics (count, mean, M2) of its raw output
(training), or the [N, C] spatial mean of its activated output (inference)."""
REDUCTIONS: tuple[Reduction, ...] = ("none", "statistics", "pool")
