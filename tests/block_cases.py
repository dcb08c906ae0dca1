"""Blocks of every kind, and what a backend makes of them against the eager modules."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from conftest import assert_buffers_close, randomize
from gpu.compare import assert_accurate
from torch import Tensor, nn

from effnet_kernels import accelerate
from effnet_kernels.backends import select
from effnet_kernels.modules import ConvBnAct, FusedMBConvConfig, MBConvConfig, SqueezeExcitation

HardGate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def mbconv(*args, probability: float = 0.0, se_layer=SqueezeExcitation, **kwargs) -> nn.Module:
    config = MBConvConfig(*args, 1, **kwargs)
    return config.block(config, probability, BatchNorm, se_layer)


def fused_mbconv(*args, probability: float = 0.0) -> nn.Module:
    config = FusedMBConvConfig(*args, 1)
    return config.block(config, probability, BatchNorm)


# name: (the module, the input's shape)
BLOCKS = {
    "expand": (lambda: mbconv(6, 3, 1, 16, 16), (3, 16, 15, 17)),
    "expand stride 2": (lambda: mbconv(6, 5, 2, 24, 40), (1, 24, 28, 28)),
    "no expand": (lambda: mbconv(1, 3, 1, 32, 16), (3, 32, 9, 7)),
    "no expand, residual": (lambda: mbconv(1, 5, 1, 24, 24), (1, 24, 7, 7)),
    "same padding": (lambda: mbconv(4, 3, 2, 16, 24, padding="same"), (1, 16, 14, 15)),
    "no squeeze, relu6": (lambda: mbconv(6, 3, 1, 16, 16, squeeze_ratio=None, activation="relu6"), (1, 16, 15, 17)),
    "kernel 7, hardswish": (
        lambda: mbconv(2, 7, 1, 16, 16, activation="hardswish", se_layer=HardGate),
        (1, 16, 9, 7),
    ),
    "stochastic depth": (lambda: mbconv(2, 3, 1, 16, 16, probability=0.5), (4, 16, 7, 7)),
    "fused": (lambda: fused_mbconv(4, 3, 2, 16, 24), (1, 16, 15, 17)),
    "fused, residual": (lambda: fused_mbconv(4, 3, 1, 16, 16), (3, 16, 7, 9)),
    "fused, one convolution": (lambda: fused_mbconv(1, 3, 1, 16, 16, probability=0.5), (4, 16, 7, 9)),
    "stem": (lambda: ConvBnAct(3, 32, 3, 2, 1, BatchNorm), (1, 3, 31, 33)),
    "stem, same padding": (lambda: ConvBnAct(3, 32, 3, 2, 1, BatchNorm, padding="same"), (1, 3, 32, 34)),
    "head": (lambda: ConvBnAct(40, 96, 1, 1, 1, BatchNorm), (3, 40, 7, 7)),
}


def torchvision_block() -> nn.Module:
    from torchvision.models.efficientnet import MBConv
    from torchvision.models.efficientnet import MBConvConfig as Config

    return MBConv(Config(4, 3, 1, 16, 16, 1), 0.5, BatchNorm)


def timm_block() -> nn.Module:
    from timm.layers import BatchNormAct2d
    from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

    layers = {"act_layer": nn.SiLU, "norm_layer": BatchNormAct2d, "se_layer": SqueezeExcite}
    return InvertedResidual(16, 24, 5, 2, pad_type="same", exp_ratio=4.0, **layers)


def timm_edge_block() -> nn.Module:
    """A dense convolution, with squeeze-and-excitation behind it."""
    from timm.layers import BatchNormAct2d
    from timm.models._efficientnet_blocks import EdgeResidual, SqueezeExcite

    layers = {"act_layer": nn.SiLU, "norm_layer": BatchNormAct2d, "se_layer": SqueezeExcite}
    return EdgeResidual(16, 16, 3, exp_ratio=3.0, **layers)


def lukemelas_block() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0")._blocks[2]


THIRD_PARTY_BLOCKS = {
    "torchvision": (lambda: accelerate(torchvision_block()), (4, 16, 7, 7)),
    "timm": (lambda: accelerate(timm_block()), (1, 16, 14, 15)),
    "timm, dense with an excitation": (lambda: accelerate(timm_edge_block()), (2, 16, 9, 7)),
    "efficientnet_pytorch": (lambda: accelerate(lukemelas_block()), (1, 24, 7, 7)),
}


def run(block: nn.Module, x: Tensor, grad: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
    """The output and the input's gradient; from one seed, so that stochastic depth draws the same."""
    torch.manual_seed(1)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(grad is not None)
    with select.use_backend(backend), torch.set_grad_enabled(grad is not None):
        y = block(x)
    if grad is not None:
        y.backward(grad.to(y.dtype))
    return y.detach(), x.grad


def compare(
    name: str, backend: str, channels_last: Callable[..., Tensor], dtype: torch.dtype, training: bool, with_grad: bool
) -> None:
    """A block against the eager modules in float64: the output, every gradient, the running statistics."""
    make, shape = (BLOCKS | THIRD_PARTY_BLOCKS)[name]
    x = channels_last(*shape, dtype=dtype)
    block = randomize(make()).train(training).to(x.device)
    # Parameters stay float32 with lower-precision maps, as under autocast; torch itself wants them alike.
    exact, alike = copy.deepcopy(block).double(), copy.deepcopy(block).to(dtype)
    with torch.no_grad(), select.use_backend("torch"):
        grad = torch.randn_like(copy.deepcopy(block)(x.float()))
    grad = grad if with_grad else None
    y, grad_x = run(block, x, grad, backend)
    y_exact, grad_exact = run(exact, x.double(), grad, "torch")
    y_alike, grad_alike = run(alike, x, grad, "torch") if dtype != torch.float32 else (None, None)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(y, y_exact, y_alike)
    if training and dtype == torch.float32:
        assert_buffers_close(block, exact.float())
    if with_grad:
        assert grad_x.dtype == dtype
        assert_accurate(grad_x, grad_exact, grad_alike)
        for (parameter_name, p), q, r in zip(
            block.named_parameters(), exact.parameters(), alike.parameters(), strict=True
        ):
            assert p.grad.stride() == p.stride(), parameter_name
            assert_accurate(p.grad, q.grad, None if dtype == torch.float32 else r.grad)


def check_nonfinite_batches(
    backend: str, channels_last: Callable[..., Tensor], skip: bool, compiled: bool = False
) -> None:
    """torch writes running statistics that are not finite; ``skip_nonfinite_statistics`` leaves them as they were."""
    block = randomize(ConvBnAct(8, 16, 1, 1, 1, nn.BatchNorm2d))
    with torch.no_grad():
        # The last channels do not read the first input channel, which overflows.
        block.conv.weight[8:, 0] = 0.0
        block.conv.weight[:8, 0] = 1.0
    assert block.skip_nonfinite_statistics is False
    block.skip_nonfinite_statistics = skip
    x = channels_last(2, 8, 5, 5)
    block.to(x.device)
    eager, before = copy.deepcopy(block), copy.deepcopy(block)
    # Its square overflows, and so does the variance of the channels that read it.
    x[0, 0, 0, 0] = 1e25
    layer = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    with torch.no_grad(), select.use_backend(backend):
        layer(x)
    with torch.no_grad(), select.use_backend("torch"):
        eager(x)
    overflows = ~eager.norm.running_var.isfinite()
    assert overflows[:8].all()
    assert not overflows[8:].any()
    kept = before if skip else eager
    for ours, whole, finite in zip(block.norm.buffers(), kept.norm.buffers(), eager.norm.buffers(), strict=True):
        if ours.dim() == 0:
            assert ours == 1
            continue
        assert torch.equal(ours[:8].isfinite(), whole[:8].isfinite())
        if skip:
            assert torch.equal(ours[:8], whole[:8])
        torch.testing.assert_close(ours[8:], finite[8:])
