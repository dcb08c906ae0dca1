"""A folded network as a module: fused chains where there are kernels, torch's own convolutions elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import block, dispatch, profiling
from effnet_kernels.activation import activate, gate_of
from effnet_kernels.folded import Excitation, Layer
from effnet_kernels.geometry import resolve_padding
from effnet_kernels.modules.chain import ChainPlan, run_chain
from effnet_kernels.ops.depthwise_conv import has_depthwise

_NOTHING = block.Buffers(None, None, None)


class _Step(NamedTuple):
    """A chain of layers, the index of the first of them, and whether its output is one of the network's."""

    chain: block.Chain
    first: int
    is_output: bool


class FoldedNetwork(nn.Module):
    """Layers with their weights as buffers. Exported, it is torch's standard operators.

    Args:
        layers: as :class:`effnet_kernels.folded.Layer` describes them.
        blocks: the layers in groups (first, behind the last), each read as one chain.
        outputs: the tensors that the network returns; each is the last of a group.
        dtype: of the weights; vectors stay float32.

    Shapes: images [N, C, H, W] to a list of maps in channels-last strides, or of [N, K] where the layers pool.
    Raises ValueError for images of another dtype, device or number of channels.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        blocks: Sequence[tuple[int, int]],
        outputs: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        # What lies behind the last output is not computed.
        layers = layers[: max(outputs)]
        self._steps = [
            _Step(_chain(layers[first:end]), first, end in outputs) for first, end in blocks if end <= len(layers)
        ]
        self.outputs = list(outputs)
        # How often other weights were loaded.
        self.generation = 0
        self._depthwise = {(layer.weight.shape[-1], layer.stride) for layer in layers if layer.depthwise}
        for index, layer in enumerate(layers):
            for name, tensor in zip(_NAMES, layer.tensors(), strict=False):
                kept = tensor.detach().to(torch.float32 if tensor.dim() == 1 else dtype).contiguous()
                # A fully connected layer is a 1x1 convolution here.
                kept = kept[:, :, None, None] if kept.dim() == 2 else kept
                self.register_buffer(f"{name}_{index}", kept)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.generation += 1

    @property
    def weight(self) -> Tensor:
        """The first layer's, which says what images are expected."""
        return self._tensor("weight", 0)

    def layers(self) -> list[Layer]:
        """The layers with their weights of this moment."""
        found: list[Layer] = []
        for chain, first, _ in self._steps:
            for index, layer in enumerate(chain.layers):
                last = index == len(chain.layers) - 1
                weight, bias, *of_excitation = self._tensors_of(first + index, layer)
                excitation = None
                if layer.excite_act is not None:
                    w1, b1, w2, b2 = of_excitation
                    excitation = Excitation(w1.flatten(1), b1, w2.flatten(1), b2, layer.excite_act, layer.excite_gate)
                depthwise, residual = layer.kind == "depthwise", first if last and chain.residual else -1
                pools = last and chain.pool
                shape = depthwise, layer.stride, layer.padding, layer.act
                found.append(Layer(weight, bias, *shape, residual, pools, excitation))
        return found

    def check(self, x: Tensor) -> None:
        """Raises ValueError for images that are not what the weights expect."""
        weight = self.weight
        if x.dim() != 4 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"expected images [N, {weight.shape[1]}, H, W], got shape {tuple(x.shape)}")
        if x.dtype != weight.dtype or x.device != weight.device:
            raise ValueError(f"expected {weight.dtype} images on {weight.device}, got {x.dtype} on {x.device}")

    def forward(self, x: Tensor) -> list[Tensor]:
        self.check(x)
        if dispatch.autocast_dtype(x) is None:
            return self._run(x)
        # The dtype of the weights is what was chosen.
        with torch.autocast("cuda" if x.is_meta else x.device.type, enabled=False):
            return self._run(x)

    def _run(self, x: Tensor) -> list[Tensor]:
        return [y for y, is_output in self.each(x) if is_output]

    def each(self, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The output of every group of layers, and whether it is one of the network's."""
        backend = dispatch.chain_backend(x)
        if backend is not None and not self._has_kernels(backend):
            backend = None
        if backend is not None:
            x = x.contiguous(memory_format=torch.channels_last)
        for chain, first, is_output in self._steps:
            own = self._chain_parameters(chain, first)
            if x.dim() == 2:
                assert own[0].norm_bias is not None
                x = F.linear(x, own[0].weight.flatten(1), own[0].norm_bias.to(x.dtype))
            elif backend is not None:
                x = run_chain(backend, ChainPlan(chain, own, [_NOTHING] * len(own)), x, None)
            else:
                x = _textbook(chain, x, own)
            yield x, is_output

    def record_convolutions(self, x: Tensor) -> None:
        """Tells torch's profiler the convolutions of images ``x``, where all layers are computed in one call."""
        size: profiling.Size = x.shape
        for chain, first, _ in self._steps:
            size = profiling.record_convolutions(chain, self._chain_parameters(chain, first), size, dense=True)

    def _chain_parameters(self, chain: block.Chain, first: int) -> list[block.Parameters]:
        return [self._parameters_of(first + i, layer) for i, layer in enumerate(chain.layers)]

    def _has_kernels(self, backend: dispatch.Backend) -> bool:
        return all(has_depthwise(backend, kernel, stride) for kernel, stride in self._depthwise)

    def _tensor(self, name: str, index: int) -> Tensor:
        # As an attribute, which older tracers know.
        return getattr(self, f"{name}_{index}")

    def _tensors_of(self, index: int, layer: block.Layer) -> list[Tensor]:
        return [self._tensor(name, index) for name in (_NAMES[:2] if layer.excite_act is None else _NAMES)]

    def _parameters_of(self, index: int, layer: block.Layer) -> block.Parameters:
        weight, bias, *excitation = self._tensors_of(index, layer)
        return block.Parameters(weight, None, None, bias, *excitation)


_NAMES = ("weight", "bias", "w1", "b1", "w2", "b2")


def _chain(layers: Sequence[Layer]) -> block.Chain:
    read: list[block.Layer] = []
    for layer in layers:
        kernel, excitation = layer.weight.shape[-1], layer.excitation
        pointwise = not layer.depthwise and kernel == 1 and layer.stride == 1
        read.append(
            block.Layer(
                "depthwise" if layer.depthwise else "pointwise" if pointwise else "dense",
                layer.stride,
                layer.padding,
                layer.act,
                batch_statistics=False,
                excite_act=None if excitation is None else excitation.act,
                excite_gate="sigmoid" if excitation is None else excitation.gate,
            )
        )
    return block.Chain(tuple(read), layers[-1].residual >= 0, layers[-1].pool)


def _textbook(chain: block.Chain, x: Tensor, parameters: Sequence[block.Parameters]) -> Tensor:
    """The chain by torch's own operators."""
    residual = x
    for layer, own in zip(chain.layers, parameters, strict=True):
        weight, _, _, bias, w1, b1, w2, b2 = (None if t is None else t.to(x.dtype) for t in own)
        assert weight is not None
        size = (x.shape[2], x.shape[3])
        left, right, top, bottom = resolve_padding(layer.padding, size, weight.shape[-1], layer.stride)
        symmetric = layer.padding != "same" and left == right == top == bottom
        if not symmetric:
            x = F.pad(x, [left, right, top, bottom])
        groups = x.shape[1] if layer.kind == "depthwise" else 1
        x = activate(F.conv2d(x, weight, bias, layer.stride, left if symmetric else 0, 1, groups), layer.act)
        if layer.excite_act is not None:
            assert w1 is not None
            assert w2 is not None
            pooled = F.adaptive_avg_pool2d(x, 1)
            hidden = activate(F.conv2d(pooled, w1, b1), layer.excite_act)
            x = x * gate_of(F.conv2d(hidden, w2, b2), layer.excite_gate)
    if chain.residual:
        x = x + residual
    return F.adaptive_avg_pool2d(x, 1).flatten(1) if chain.pool else x
