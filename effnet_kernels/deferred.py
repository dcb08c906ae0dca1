"""The debt that an activation carries between two convolutions.

A convolution of this package reads the raw output ``x`` of the convolution before it, and what is still owed to it::

    a[n, c, h, w] = act(scale[c] * x[n, c, h, w] + shift[c]) * gate[n, c]

``scale`` and ``shift`` are BatchNorm, ``gate`` is squeeze-and-excitation. The consumer pays the debt while it loads
(:class:`Prologue`); at inference, where the statistics are known beforehand, the producer pays it before it stores
(:class:`Epilogue`).
"""

from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["none", "silu", "relu", "relu6", "hardswish"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "silu", "relu", "relu6", "hardswish")

Padding = tuple[int, int, int, int]
"""Zeros added on the (left, right, top, bottom), in the order of ``torch.nn.functional.pad``."""


class Prologue(NamedTuple):
    """What is owed to an input, paid on load: ``act(scale * x + shift) * gate``. Any part may be absent."""

    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"
    gate: Tensor | None = None  # [N, C], fp32


class Epilogue(NamedTuple):
    """What is applied to an output before it is stored: ``act(scale * y + shift) + residual``."""

    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"
    residual: Tensor | None = None  # [N, C, H, W], the output's dtype


Reduction = Literal["none", "statistics", "pool"]
"""What a convolution returns beside its output: nothing, the [3, C] statistics (count, mean, M2) of its raw output
(training), or the [N, C] spatial mean of its activated output (inference)."""
REDUCTIONS: tuple[Reduction, ...] = ("none", "statistics", "pool")
