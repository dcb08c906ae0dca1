"""A frozen network on the CPU: its layers as data, and one native call that runs them all."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends.batch_norm import folded
from effnet_kernels.backends.cpu.extension import extension
from effnet_kernels.backends.cpu.memory import (
    ACTIVATION_INDEX,
    address,
    check_bf16,
    empty_map,
    execution,
    strided_address,
)
from effnet_kernels.backends.operands import as_contiguous, in_memory
from effnet_kernels.fusion.spec import GATES, Chain, Layer


class StepProfile(NamedTuple):
    """The time of one step of a network."""

    name: str
    multiply_adds: int
    seconds: float


class Network:
    """Chains that run in one native call, in float32 or bfloat16. Weights are packed here.

    In bfloat16 every map is rounded to it, what a layer computes between two maps is not.

    Any number of threads may call one network.

    Args:
        chains: each reads the output of the one before; norms are those of eval mode, and are folded. A fully connected
            layer is a 1x1 convolution of one pixel.
        outputs: the numbers of the chains whose outputs are returned, ascending.
        dtype: of the maps; that of the weights if None. Weights that are not of it are rounded once, after the norms
            are folded.
        winograd: whether Winograd's transforms may be used, which take sums in another order.

    Raises ValueError where the layers do not fit together, and for bfloat16 where the instruction set in use has no
    kernels for it.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        outputs: Sequence[int],
        dtype: torch.dtype | None = None,
        winograd: bool = True,
    ) -> None:
        layers = [layer for chain in chains for layer in chain.layers]
        self._channels = layers[0].in_channels
        bf16_weights = all(layer.weight.dtype == torch.bfloat16 for layer in layers)
        bf16 = bf16_weights if dtype is None else dtype == torch.bfloat16
        if bf16:
            check_bf16()
        self._dtypes = (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)
        # The name holds the tensors until they are packed: the extension takes addresses alone.
        held = [_canonical(chain, torch.bfloat16 if bf16_weights else torch.float32) for chain in chains]
        vectors: list[Tensor] = []
        winograd = winograd and os.environ.get("EFFNET_KERNELS_WINOGRAD") != "0"
        described: list[dict[str, object]] = []
        ends: list[int] = []
        for chain in held:
            # The extension numbers tensors: 0 is the image, and layer i makes tensor i + 1 out of tensor i.
            begin = len(described)
            described += [_describe(layer, vectors) | {"winograd": winograd} for layer in chain.layers]
            described[-1] |= {"residual": begin if chain.residual else -1, "pool": chain.pool}
            ends.append(len(described))
        self._native = extension().Network(described, [ends[index] for index in outputs], bf16, bf16_weights)

    def run(self, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
        """The outputs [N, K, H', W'] for images x [N, C, H, W] on the CPU, in any strides, and in the image's dtype.

        Raises ValueError for another dtype than float32 or the network's, and for a network in bfloat16 where the
        instruction set in use has no kernels for it.
        """
        outputs, _ = self._call(x, memory_format, False)
        return outputs

    def profile(self, x: Tensor) -> list[StepProfile]:
        """The time of each step for images x."""
        _, steps = self._call(x, torch.contiguous_format, True)
        return [StepProfile(*step) for step in steps or ()]

    def _call(
        self, x: Tensor, memory_format: torch.memory_format, profiled: bool
    ) -> tuple[list[Tensor], list[tuple[str, int, float]] | None]:
        if x.dim() != 4 or x.shape[1] != self._channels:
            raise ValueError(f"expected images [N, {self._channels}, H, W], got shape {tuple(x.shape)}")
        batch, _, height, width = x.shape
        if x.dtype not in self._dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
            raise ValueError(f"x: expected a {expected} tensor on the CPU, got {x.dtype} on {x.device}")
        # Channels, rows and columns of every output.
        sizes = self._native.output_sizes(height, width)
        outputs = [_empty(batch, size, x.dtype, memory_format) for size in sizes]
        if batch == 0:
            return outputs, None
        views = [strided_address("output", y, *y.shape, dtype=x.dtype) for y in outputs]
        x = in_memory(x)
        image = strided_address("x", x, *x.shape, dtype=x.dtype)
        threads, isa = execution()
        steps = self._native.run(image, batch, height, width, views, x.dtype == torch.bfloat16, threads, profiled, isa)
        return outputs, steps


def _canonical(chain: Chain, dtype: torch.dtype) -> Chain:
    """The chain with its parameters as the extension reads them: weights of one dtype, vectors in float32."""

    def canonical(t: Tensor) -> Tensor:
        return as_contiguous(t.detach().to("cpu", torch.float32 if t.dim() == 1 else dtype))

    return chain.with_parameters([None if t is None else canonical(t) for t in chain.parameters()])


def _empty(batch: int, size: tuple[int, int, int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    if memory_format is torch.channels_last:
        return empty_map(batch, *size, dtype)
    return torch.empty((batch, *size), dtype=dtype, device="cpu", memory_format=memory_format)


def _describe(layer: Layer, vectors: list[Tensor]) -> dict[str, object]:
    """The layer as the extension takes it; tensors that are made for it are added to ``vectors``, which holds them."""
    outputs, kernel, dtype = layer.out_channels, layer.kernel_size, layer.weight.dtype
    scale, bias = None, layer.bias
    if layer.norm is not None:
        scale, bias = folded(layer.norm, layer.bias)
        bias = bias.float()
        vectors += [scale, bias]
    assert bias is not None
    per_output = 1 if layer.kind == "depthwise" else layer.in_channels
    description: dict[str, object] = {
        "depthwise": layer.kind == "depthwise",
        "in_channels": layer.in_channels,
        "out_channels": outputs,
        "kernel": kernel,
        "stride": layer.stride,
        "padding": None if layer.padding == "same" else tuple(layer.padding),
        "act": ACTIVATION_INDEX[layer.act],
        "residual": -1,
        "pool": False,
        "weight": address("weight", layer.weight, outputs, per_output, kernel, kernel, dtype=dtype),
        "scale": address("scale", scale, outputs, dtype=torch.float64),
        "bias": address("bias", bias, outputs),
        "squeeze": 0,
    }
    if layer.excitation is not None:
        w1, b1, w2, b2, act, gate = layer.excitation.with_biases()
        assert b1 is not None
        assert b2 is not None
        vectors += [b1, b2]
        squeezed = w1.shape[0]
        description |= {
            "squeeze": squeezed,
            "squeeze_act": ACTIVATION_INDEX[act],
            "gate": GATES.index(gate),
            "w1": address("w1", w1, squeezed, outputs, 1, 1, dtype=dtype),
            "b1": address("b1", b1, squeezed),
            "w2": address("w2", w2, outputs, squeezed, 1, 1, dtype=dtype),
            "b2": address("b2", b2, outputs),
        }
    return description
