"""What is computed, as data: the operands of a convolution, and chains of convolutions with their tensors.

A convolution of this package reads the raw output ``x`` of the convolution before it. The norm, the activation and the
gate between the two are its prologue, applied to ``x`` on load::

    a[n, c, h, w] = act(scale[c] * x[n, c, h, w] + shift[c]) * gate[n, c]

``scale`` and ``shift`` are BatchNorm, ``gate`` is squeeze-and-excitation. At inference, where the statistics are known
beforehand, norm and activation are the epilogue of the convolution before, applied before the store.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

Activation = Literal["none", "silu", "relu", "relu6", "hardswish"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Gate = Literal["sigmoid", "hardsigmoid"]
"""How squeeze-and-excitation makes its gate of a number; the hard one is ``relu6(z + 3) / 6``."""
GATES: tuple[Gate, ...] = get_args(Gate)

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
    """What is applied to an input on load: ``act(scale * x + shift) * gate``. Any part may be absent."""

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

        dz = (grad * gate[n, c] * drop_path_scale[n] + offset[n, c]) * act'(scale[c] * y + shift[c])
        dy = alpha[c] * dz + beta[c] * y + gamma[c]

    ``dz`` is the gradient of BatchNorm's output, and ``coefficients`` are BatchNorm's backward. Any part may be absent:
    a grad is then 0, a factor 1, an offset 0, and without coefficients dy is dz.
    """

    grad: Tensor | None  # [N, C, H, W], the maps' dtype
    y: Tensor | None = None  # [N, C, H, W], the maps' dtype
    coefficients: Tensor | None = None  # [3, C], fp32: alpha, beta, gamma
    gate: Tensor | None = None  # [N, C], fp32
    drop_path_scale: Tensor | None = None  # [N], fp32
    offset: Tensor | None = None  # [N, C], fp32
    scale: Tensor | None = None  # [C], fp32
    shift: Tensor | None = None  # [C], fp32
    act: Activation = "none"

    def by_sample(self) -> bool:
        """Whether samples differ in more than their maps."""
        return self.gate is not None or self.drop_path_scale is not None or self.offset is not None


class PixelSums(NamedTuple):
    """What the backward of a pointwise convolution sums over the pixels of each image, [N, C] each.

    The convolution reads ``gate * u`` of a raw input x, with ``u = act(scale * x + shift)``; dq is the gradient of what
    it reads, u' is act's derivative. ``docs/design.md`` derives what follows from the sums. Kernels store them in this
    order in one tensor of T partial results: [N, T, 5, C], or [N, T, 3, C] where the sums of the slope are not needed
    or come from the forward pass.
    """

    grad_gate: Tensor  # of dq * u
    grad_shift: Tensor  # of dq * u'
    grad_scale: Tensor  # of dq * u' * (x - mean)
    slope: Tensor  # of u'
    centred_slope: Tensor  # of u' * (x - mean)


# Parts of that tensor's third dimension: the three sums over dq; of them the two that BatchNorm's gradient needs; the
# two sums over the slope.
SUMS_OF_GRADIENT, SUMS_OF_NORM, SUMS_OF_SLOPES = slice(0, 3), slice(1, 3), slice(3, 5)


Reduction = Literal["none", "statistics", "pool"]
"""What a convolution returns beside its output: nothing, the [3, C] statistics (count, mean, M2) of its raw output
(training), or the [N, C] spatial mean of its activated output (inference)."""
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


LayerKind = Literal["pointwise", "depthwise", "dense"]


class BatchNorm(NamedTuple):
    """A BatchNorm behind a convolution with K output channels.

    Attributes:
        weight, bias: [K]; the paper calls them gamma and beta, which are other numbers here.
        running_mean, running_var, num_batches_tracked: the running statistics, [K], [K] and [].
        eps, momentum: without a momentum the running statistics average over all batches.
        batch_statistics: whether it normalises by the batch's statistics.
        tracks: whether a pass with the batch's statistics updates the running ones, in place.
        skip_nonfinite: see :class:`~effnet_kernels.modules.ConvBnAct`.
        process_group: the name of the processes whose batches are normalised as one, empty for all of them; None for
            the batch of this process alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_statistics: bool = False
    tracks: bool = False
    skip_nonfinite: bool = False
    process_group: str | None = None


class Excitation(NamedTuple):
    """Squeeze-and-excitation: ``gate(expand_weight @ act(reduce_weight @ mean + reduce_bias) + expand_bias)``."""

    reduce_weight: Tensor  # [S, K, 1, 1]
    reduce_bias: Tensor | None  # [S]
    expand_weight: Tensor  # [K, S, 1, 1]
    expand_bias: Tensor | None  # [K]
    act: Activation
    gate: Gate = "sigmoid"

    def with_biases(self) -> "Excitation":
        """With zeros for a bias that is not there."""
        w1, b1, w2, b2, _, _ = self
        return self._replace(
            reduce_bias=w1.new_zeros(w1.shape[0]) if b1 is None else b1,
            expand_bias=w2.new_zeros(w2.shape[0]) if b2 is None else b2,
        )


Parameters = tuple[Tensor | None, ...]
"""A layer's differentiable tensors, in the order of :meth:`Layer.parameters`."""


class Layer(NamedTuple):
    """A convolution with its BatchNorm, its activation and the squeeze-and-excitation behind them.

    Attributes:
        kind: of the convolution. A dense one can only be the first of a chain.
        weight: [K, C, 1, 1], depthwise [C, 1, k, k], dense [K, C, k, k].
        bias: [K].
        stride: of rows and columns alike.
        padding: zeros on the (left, right, top, bottom), or ``"same"`` for TensorFlow's, which follows from the map's
            size.
        norm: None where BatchNorm is folded into weight and bias.
        act: the activation behind the norm.
        excitation: its gate scales the activated output, which a pointwise layer has to read.
    """

    kind: LayerKind
    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: Padding | Literal["same"] = (0, 0, 0, 0)
    norm: BatchNorm | None = None
    act: Activation = "none"
    excitation: Excitation | None = None

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] if self.kind == "depthwise" else self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    @property
    def batch_statistics(self) -> bool:
        return self.norm is not None and self.norm.batch_statistics

    def parameters(self) -> Parameters:
        """The convolution's weight and bias, the norm's, those of squeeze-and-excitation's two layers.

        Weights and biases take turns, also where one of them is None.
        """
        norm = (None, None) if self.norm is None else self.norm[:2]
        excitation = (None,) * 4 if self.excitation is None else self.excitation[:4]
        return (self.weight, self.bias, *norm, *excitation)

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> "Layer":
        """The layer with other tensors in place of :meth:`parameters`."""
        weight, bias, norm_weight, norm_bias, *rest = parameters
        w1, b1, w2, b2 = cast(Any, rest)
        kind, _, _, stride, padding, norm, act, own = self
        assert weight is not None
        return Layer(
            kind,
            weight,
            bias,
            stride,
            padding,
            None if norm is None else BatchNorm(norm_weight, norm_bias, *norm[2:]),
            act,
            None if own is None else Excitation(w1, b1, w2, b2, own.act, own.gate),
        )


PARAMETERS_OF_A_LAYER = 8


def are_the_same(value: Any, other: Any) -> bool:
    """Whether two chains, or lists of them, have the same tensors and equal settings."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return value is other
    if isinstance(value, tuple | list):
        same_form = type(value) is type(other) and len(value) == len(other)
        return same_form and all(map(are_the_same, value, other))
    return bool(value == other)


class Chain(NamedTuple):
    """Layers, each of which reads what the one before it makes.

    Attributes:
        layers: at least one.
        residual: whether the chain's input is added to its output.
        pool: whether the output is its own mean over all pixels, [N, K].
    """

    layers: tuple[Layer, ...]
    residual: bool = False
    pool: bool = False

    @property
    def batch_statistics(self) -> bool:
        """Whether a BatchNorm normalises by the batch's statistics."""
        return any(layer.batch_statistics for layer in self.layers)

    def parameters(self) -> list[Tensor | None]:
        """Those of its layers, one after another."""
        return [t for layer in self.layers for t in layer.parameters()]

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> "Chain":
        """The chain with other tensors in place of :meth:`parameters`."""
        rows = range(0, len(parameters), PARAMETERS_OF_A_LAYER)
        layers = [
            layer.with_parameters(parameters[start : start + PARAMETERS_OF_A_LAYER])
            for layer, start in zip(self.layers, rows, strict=True)
        ]
        return self._replace(layers=tuple(layers))

    def of_convolutions(self) -> list[Tensor]:
        """Weights and biases, without those of norms."""
        rows = (layer.parameters() for layer in self.layers)
        return [t for weight, bias, _, _, *excitation in rows for t in (weight, bias, *excitation) if t is not None]

    def all_tensors(self) -> list[Tensor | None]:
        """All parameters, running statistics and counts of batches."""
        norms = [layer.norm for layer in self.layers if layer.norm is not None]
        return [*self.parameters(), *(t for norm in norms for t in norm[2:5])]

    def tensors(self) -> list[Tensor]:
        """All parameters and running statistics."""
        norms = [layer.norm for layer in self.layers if layer.norm is not None]
        found = [*self.parameters(), *(t for norm in norms for t in (norm.running_mean, norm.running_var))]
        return [t for t in found if t is not None]
