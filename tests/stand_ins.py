"""The primitives of the fused chains in plain PyTorch, in the kernels' places, so that the chains run on any device."""

from types import SimpleNamespace

import pytest
import torch
from gpu import exact
from torch import Tensor

from effnet_kernels import block, dense, dispatch
from effnet_kernels.deferred import Prologue


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, CPU tensors are taken for a GPU's and the chains compute with the equations."""
    equations = SimpleNamespace(**_PRIMITIVES)
    monkeypatch.setattr(block, "primitives_for", lambda x: equations)
    monkeypatch.setattr(dispatch, "_triton_unavailable", lambda: None)
    monkeypatch.setattr(dispatch.Call, "on_gpu", lambda self: True)


def _map(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def pointwise_conv(x, weight, bias, prologue, epilogue, reduction):
    y, reduced = exact.pointwise_conv(x, weight, bias, prologue, epilogue, reduction)
    return y if y is None else _map(y), reduced if reduced is None else reduced.unsqueeze(
        1 if reduction == "pool" else 0
    )


def depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction):
    y, reduced = exact.depthwise_conv(x, weight, stride, padding, prologue, epilogue, reduction)
    return _map(y), reduced if reduced is None else reduced.unsqueeze(1 if reduction == "pool" else 0)


def pointwise_conv_backward(gradient, weight, x, prologue, mean, residual, through, needs_input, needs_weight):
    dx, sums, dweight = None, None, None
    if needs_input:
        raw, owed = (None, Prologue()) if mean is None else (x, prologue)
        dx, sums = exact.pointwise_conv_backward_data(gradient, weight, raw, owed, mean, residual, through)
        dx, sums = _map(dx), sums if sums is None else sums[:, None]
    if needs_weight:
        dweight = exact.pointwise_conv_backward_weight(gradient, x, prologue)
    return dx, sums, dweight


def dense_conv(x, weight, bias, stride, padding, reduction):
    y = dense.conv(x, weight, bias, stride, padding)
    return y, exact.moments(y)[None] if reduction == "statistics" else None


def dense_conv_backward(gradient, *arguments):
    return dense.conv_backward(_map(exact.apply_gradient(gradient, None)), *arguments)


def depthwise_conv_backward(*arguments):
    dz, sums, dweight = exact.depthwise_conv_backward(*arguments)
    return _map(dz), sums if sums is None else sums[None], dweight


def fold_batch_norm(partials, weight, bias, running_mean, running_var, momentum, eps, skip_nonfinite):
    (stats,) = partials
    if isinstance(momentum, Tensor):
        momentum = 1.0 / momentum.float()
    zero = torch.zeros_like(stats[0])
    read = (zero, zero) if running_mean is None else (running_mean, running_var)
    *folded, mean, var = exact.fold_batch_norm(stats, weight, bias, *read, momentum, eps)
    if running_mean is not None:
        running_mean.copy_(mean)
        running_var.copy_(var)
    return torch.stack(folded)


def fold_batch_norm_backward(sums, *arguments):
    return exact.fold_batch_norm_backward(sums.sum(dim=0), *arguments)


def excite(sums, *arguments):
    return exact.excite(sums.sum(dim=1), *arguments)


def excite_backward(sums, *arguments):
    offset, logits, dhidden, norm_sums = exact.excite_backward(sums.sum(dim=1), *arguments)
    return offset, logits, dhidden, norm_sums


_PRIMITIVES = {
    "apply_gradient": lambda gradient, residual: _map(exact.apply_gradient(gradient, residual)),
    "channel_statistics": lambda y: exact.moments(y)[None],
    "dense_conv": dense_conv,
    "dense_conv_backward": dense_conv_backward,
    "depthwise_conv": depthwise_conv,
    "depthwise_conv_backward": depthwise_conv_backward,
    "excite": excite,
    "excite_backward": excite_backward,
    "excite_backward_weight": exact.excite_backward_weight,
    "fold_batch_norm": fold_batch_norm,
    "fold_batch_norm_backward": fold_batch_norm_backward,
    "gradient_sums": lambda gradient, mean: exact.gradient_sums(gradient, mean)[None],
    "mean_of_sums": lambda sums, count: sums.sum(dim=1) / count,
    "merge": lambda *arguments: _map(exact.merge(*arguments)),
    "pointwise_conv": pointwise_conv,
    "pointwise_conv_backward": pointwise_conv_backward,
    "squeeze": lambda x, prologue: exact.squeeze(x, prologue, None)[:, None],
}
