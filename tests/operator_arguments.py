"""Calls of every registered operator."""

from collections.abc import Iterator

import torch
from conftest import randomize
from torch import Tensor, nn

from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.backends.select import primitives_of
from effnet_kernels.fusion import custom_ops
from effnet_kernels.fusion.forward import forward
from effnet_kernels.fusion.spec import Chain
from effnet_kernels.modules import MBConvConfig


def mbconv_chain(config: MBConvConfig, training: bool) -> Chain:
    block = randomize(config.block(config, 0.0, nn.BatchNorm2d)).train(training)
    return block.chain_spec().chain


def operator_calls(config: MBConvConfig, x: Tensor, drop_path_scale: Tensor | None) -> Iterator[tuple]:
    """Each operator and arguments for it, of a block's chain for x [N, C, H, W]."""
    operators = torch.ops.effnet_kernels
    backend = select.operator_backend(x)
    chain = mbconv_chain(config, training=True)
    text, parameters, running = custom_ops.encode(backend, chain)
    assert running == []
    yield operators.chain_forward.default, (x.clone().requires_grad_(), drop_path_scale, parameters, running, text)

    with torch.no_grad():
        out, saved = forward(primitives_of(backend), chain, x, drop_path_scale)
        inputs = [t.detach() for t in parameters]
        needs = [True] * (1 + len(parameters))
        arguments = (torch.randn_like(out), x, drop_path_scale, inputs, saved, text, needs)
        yield operators.chain_backward.default, arguments

    text, parameters, running = custom_ops.encode(backend, mbconv_chain(config, training=False))
    yield operators.chain_inference.default, (x, [t.detach() for t in parameters], running, text)


def recorded_outputs(device: str) -> dict[str, Tensor]:
    """What the public operators return of operands that require gradients, by the names of their Functions."""
    x = torch.randn(2, 8, 5, 6, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    w, taps, w1, w2, scale = (
        torch.rand(*size, device=device) for size in ((8, 8, 1, 1), (8, 1, 3, 3), (4, 8), (8, 4), (8,))
    )
    prologue = ops.Prologue(scale, scale, "silu")
    return {
        "PointwiseConv": ops.pointwise_conv(x, w, prologue=prologue, reduction="statistics")[0],
        "DepthwiseConv": ops.depthwise_conv(x, taps, padding=1, prologue=prologue, reduction="statistics")[0],
        "ChainFunction": ops.depthwise_conv_bn_silu(x, taps, None, None, None, None, 1, 1, training=True),
        "Squeeze": ops.squeeze(x, prologue),
        "Excite": ops.excite(ops.squeeze(x), w1, None, w2, None),
        "SqueezeExcite": ops.squeeze_excite(x, w1, None, w2, None),
        "BnActAdd": ops.bn_act_add(x, prologue),
    }
