"""The end of a chain: BatchNorm and activation, stochastic depth's factor of each sample, and the residual."""

import torch
from torch import Tensor

from effnet_kernels.backends.triton.configs import target_of
from effnet_kernels.backends.triton.configs.elementwise import stream
from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
from effnet_kernels.backends.triton.launch import channel_divisor, launcher
from effnet_kernels.fusion.spec import Prologue

launch_bn_act_add = launcher(bn_act_add_kernel)


def bn_act_add(x: Tensor, prologue: Prologue, residual: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    """``drop_path_scale[n] * act(scale * x + shift) * gate + residual``: [N, C, H, W] to the same."""
    samples, channels, height, width = x.shape
    by_sample = prologue.gate is not None or drop_path_scale is not None
    groups, rows = (samples, height * width) if by_sample else (1, samples * height * width)
    config = stream(groups, rows, channels, target_of(x))
    out = torch.empty_like(x, memory_format=torch.channels_last)
    scale, shift, act, gate, statistics = prologue
    divisor = channel_divisor(channels)
    launch_bn_act_add(
        (config.num_programs, -(-channels // config.block_c), groups),
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        mean_ptr=None if statistics is None else statistics.mean,
        var_ptr=None if statistics is None else statistics.var,
        gate_ptr=gate,
        drop_path_scale_ptr=drop_path_scale,
        residual_ptr=residual,
        out_ptr=out,
        rows=rows,
        c_quotient=channels // divisor,
        eps=0.0 if statistics is None else statistics.eps,
        ACT=act,
        C_DIVISOR=divisor,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return out
