"""The primitives that every backend has: the operators forward and backward, on tensors, without autograd.

Maps are [N, C, H, W] in channels-last strides, vectors and partial results contiguous and fp32 (fp64 beside maps in
fp64, which the reference alone has). The backend chooses how many partial results there are, and the caller merges
them.
"""

from typing import Literal, Protocol

from torch import Tensor

from effnet_kernels.fusion.spec import Activation, Epilogue, Gate, OutputGradient, Padding, Prologue, Reduction


class Primitives(Protocol):
    """A backend's primitives. ``backends/reference/primitives.py`` documents them."""

    def pointwise_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prologue: Prologue,
        epilogue: Epilogue,
        reduction: Reduction,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def pointwise_conv_backward(
        self,
        gradient: OutputGradient,
        weight: Tensor,
        x: Tensor,
        prologue: Prologue,
        mean: Tensor | None,
        residual: Tensor | None,
        apply_act_grad: bool,
        needs_input: bool,
        needs_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

    def depthwise_conv(
        self,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: Padding,
        prologue: Prologue,
        epilogue: Epilogue,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor | None]: ...

    def depthwise_conv_backward(
        self,
        gradient: OutputGradient,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: Padding,
        prologue: Prologue,
        mean: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]: ...

    def dense_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding, reduction: Reduction
    ) -> tuple[Tensor, Tensor | None]: ...

    def dense_conv_backward(
        self,
        gradient: OutputGradient,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: Padding,
        residual: Tensor | None,
        needs_input: bool,
        needs_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def channel_statistics(self, y: Tensor) -> Tensor: ...

    def merge_statistics(self, partials: Tensor) -> Tensor: ...

    def gradient_sums(self, gradient: OutputGradient, mean: Tensor) -> Tensor: ...

    def apply_gradient(self, gradient: OutputGradient, residual: Tensor | None) -> Tensor: ...

    def finalize_batch_norm(
        self,
        partials: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        skip_nonfinite: bool,
    ) -> Tensor: ...

    def finalize_batch_norm_backward(
        self,
        sums: Tensor,
        count: int,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        batch_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def squeeze(self, x: Tensor, prologue: Prologue, factor: Tensor | None = None) -> Tensor: ...

    def squeeze_for_backward(self, x: Tensor, prologue: Prologue, mean: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def mean_of_sums(self, sums: Tensor, count: int) -> Tensor: ...

    def excite(
        self,
        sums: Tensor,
        count: int,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        act: Activation,
        kind: Gate,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def excite_backward(
        self,
        sums: Tensor,
        count: int,
        gate: Tensor,
        hidden: Tensor,
        w1: Tensor,
        w2: Tensor,
        act: Activation,
        kind: Gate,
        slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...

    def excite_backward_weight(
        self, grad_logits: Tensor, grad_hidden: Tensor, hidden: Tensor, pooled: Tensor, act: Activation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def bn_act_add(
        self, x: Tensor, prologue: Prologue, residual: Tensor | None, drop_path_scale: Tensor | None
    ) -> Tensor: ...


PrimitivesBackend = Literal["reference", "cpu", "triton"]
PRIMITIVES_BACKENDS: tuple[PrimitivesBackend, ...] = ("reference", "cpu", "triton")
"""The backends that have primitives; "torch" has modules alone."""


def has_depthwise(backend: PrimitivesBackend, kernel: int, stride: int) -> bool:
    """Whether a backend has a depthwise convolution of this size and stride."""
    return backend == "reference" or (kernel in (3, 5, 7) and (stride in (1, 2) or backend == "cpu"))


MAX_SQUEEZED = 1024
"""The most channels of squeeze-and-excitation's hidden layer that a program on a GPU holds; the family has 4 to 288."""


def has_excitation(backend: PrimitivesBackend, squeezed: int) -> bool:
    """Whether a backend has squeeze-and-excitation with a hidden layer of so many channels."""
    return backend != "triton" or squeezed <= MAX_SQUEEZED
