"""Calls of every registered operator."""

from collections.abc import Iterator

import torch
from conftest import randomize
from torch import Tensor, nn

from effnet_kernels import dispatch, registration
from effnet_kernels.block import flatten_stored, forward, unflatten
from effnet_kernels.modules import MBConvConfig
from effnet_kernels.modules.chain import ChainPlan, plan_chain
from effnet_kernels.primitives import primitives_of


def mbconv_plan(config: MBConvConfig, training: bool) -> ChainPlan:
    block = randomize(config.block(config, 0.0, nn.BatchNorm2d)).train(training)
    return plan_chain(block.parts())


def operator_calls(config: MBConvConfig, x: Tensor, keep: Tensor | None) -> Iterator[tuple]:
    """Each operator and arguments for it, of a block's chain for x [N, C, H, W]."""
    operators = torch.ops.effnet_kernels
    backend = dispatch.operator_backend(x)
    plan = mbconv_plan(config, training=True)
    flat = [t for own in plan.parameters for t in own]
    tensors = [t for t in flat if t is not None]
    text = registration.encode(
        backend, plan.chain, [t is not None for t in flat] + [False] * 2 * len(plan.chain.layers)
    )
    yield operators.chain_forward.default, (x.clone().requires_grad_(), keep, tensors, [], text)

    with torch.no_grad():
        out, stored = forward(primitives_of(backend), plan.chain, x, keep, unflatten(flat), plan.buffers)
        inputs = [t.detach() for t in tensors]
        needs = [True] * (1 + len(tensors))
        arguments = (torch.randn_like(out), x, keep, inputs, flatten_stored(stored), text, needs)
        yield operators.chain_backward.default, arguments

    plan = mbconv_plan(config, training=False)
    running = [t for norm in plan.buffers for t in norm[:2]]
    flat = [t for own in plan.parameters for t in own]
    text = registration.encode(backend, plan.chain, [t is not None for t in flat] + [True] * len(running))
    yield operators.chain_inference.default, (x, [t.detach() for t in flat if t is not None], running, text)
