"""A folded network as a module: fused chains where there are kernels, torch's own convolutions elsewhere."""

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels.backends import profiling, select
from effnet_kernels.backends.activation import activate, gate_of
from effnet_kernels.backends.base import PRIMITIVES_BACKENDS
from effnet_kernels.fusion import autograd
from effnet_kernels.fusion.geometry import resolve_padding
from effnet_kernels.fusion.inspection import missing_kernel
from effnet_kernels.fusion.sequence import ChainSequence
from effnet_kernels.fusion.spec import Chain, Excitation, Layer


class FoldedNetwork(nn.Module):
    """Chains whose BatchNorms are folded, with their weights as buffers. Exported, it is torch's standard operators.

    Args:
        chains: each reads the output of the one before; none of their layers has a norm.
        outputs: the numbers of the chains whose outputs the network returns, ascending.
        dtype: of the weights; vectors stay float32.

    Shapes: images [N, C, H, W] to a list of maps in channels-last strides, or of [N, K] where a chain pools.
    In bfloat16 on the CPU images may be float32 as well, and so are the outputs then.
    Raises ValueError for images of another dtype, device or number of channels.
    """

    def __init__(self, chains: Sequence[Chain], outputs: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # Chains behind the last output are not computed.
        chains = chains[: max(outputs) + 1]
        self.outputs = list(outputs)
        # How often other weights were loaded.
        self.generation = 0
        # The chains' settings; their tensors are meta tensors here, and the buffers take their places.
        self._settings: list[Chain] = []
        self._assembled: _Assembled | None = None
        self._missing_kernels = {backend: missing_kernel(backend, chains) for backend in PRIMITIVES_BACKENDS}
        number = 0
        for chain in chains:
            self._settings.append(chain.with_parameters([_setting(t) for t in chain.parameters()]))
            for layer in chain.layers:
                for name, tensor in zip(_NAMES, _tensors_of(layer), strict=False):
                    kept = tensor.detach().to(torch.float32 if tensor.dim() == 1 else dtype).contiguous()
                    self.register_buffer(f"{name}_{number}", kept)
                number += 1

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.generation += 1

    @property
    def weight(self) -> Tensor:
        """The first layer's weight, which images have to fit."""
        return self._buffer("weight", 0)

    def chains(self) -> list[Chain]:
        """The chains with their weights of this moment; the same ones while the buffers are the same."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._assemble()
        return self._current().chains

    def _current(self) -> "_Assembled":
        buffers = list(self._buffers.values())
        if self._assembled is None or not all(map(operator.is_, buffers, self._assembled.buffers)):
            chains = self._assemble()
            self._assembled = _Assembled(buffers, chains, self._sequences(chains))
        return self._assembled

    def _sequences(self, chains: list[Chain]) -> list[ChainSequence]:
        """The chains of each output, and the fully connected layer behind a pooled one by itself."""
        ends = [number + 1 for number, chain in enumerate(chains) if number in self.outputs or chain.pool]
        return [ChainSequence(chains[begin:end]) for begin, end in itertools.pairwise([0, *ends])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_assembled": None}

    def _assemble(self) -> list[Chain]:
        number, found = 0, []
        for chain in self._settings:
            layers = []
            for layer in chain.layers:
                names = _NAMES[:2] if layer.excitation is None else _NAMES
                weight, bias, *excitation = (self._buffer(name, number) for name in names)
                layers.append(layer.with_parameters((weight, bias, None, None, *(excitation or (None,) * 4))))
                number += 1
            found.append(chain._replace(layers=tuple(layers)))
        return found

    def check(self, x: Tensor) -> None:
        """Raises ValueError for images that are not what the weights expect."""
        weight = self.weight
        if x.dim() != 4 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"expected images [N, {weight.shape[1]}, H, W], got shape {tuple(x.shape)}")
        dtypes = [weight.dtype]
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            dtypes.append(torch.float32)
        if x.dtype not in dtypes or x.device != weight.device:
            expected = " or ".join(map(str, dtypes))
            raise ValueError(f"expected {expected} images on {weight.device}, got {x.dtype} on {x.device}")

    def forward(self, x: Tensor) -> list[Tensor]:
        self.check(x)
        # The user has chosen the dtype of the weights.
        with select.without_autocast(x):
            return [y.to(x.dtype) for y in self._outputs(x.to(self.weight.dtype))]

    def _outputs(self, x: Tensor) -> Iterator[Tensor]:
        observed = torch.compiler.is_compiling() or profiling.enabled()
        if observed or select.chain_backend(x) != "triton" or self._missing_kernels["triton"]:
            yield from (y for y, is_output in self.each(x) if is_output)
            return
        x, number = x.contiguous(memory_format=torch.channels_last), 0
        for sequence in self._current().sequences:
            number += len(sequence.chains)
            x = _linear(sequence.chains[0], x) if x.dim() == 2 else sequence.infer_on_gpu(x)
            if number - 1 in self.outputs:
                yield x

    def each(self, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The output of every chain, and whether it is one of the network's."""
        backend = select.chain_backend(x)
        if backend is not None and self._missing_kernels[backend]:
            backend = None
        if backend is not None:
            x = x.contiguous(memory_format=torch.channels_last)
        for number, chain in enumerate(self.chains()):
            if x.dim() == 2:
                x = _linear(chain, x)
            elif backend is not None:
                x = autograd.run(backend, chain, x, None)
            else:
                x = _run_eagerly(chain, x)
            yield x, number in self.outputs

    def record_convolutions(self, x: Tensor) -> None:
        """Records the convolutions of images ``x`` for torch's profiler, where one call computes all layers."""
        size: profiling.Size = x.shape
        for chain in self.chains():
            size = profiling.record_convolutions(chain, size, dense=True)

    def _buffer(self, name: str, number: int) -> Tensor:
        # As an attribute, which older tracers know.
        return getattr(self, f"{name}_{number}")


class _Assembled(NamedTuple):
    """The chains as they were made of buffers, and as they are computed together."""

    buffers: list[Tensor | None]
    chains: list[Chain]
    sequences: list[ChainSequence]


_NAMES = ("weight", "bias", "w1", "b1", "w2", "b2")


def _tensors_of(layer: Layer) -> list[Tensor]:
    """The layer's tensors, in the order of ``_NAMES``."""
    found = [layer.weight, layer.bias, *(() if layer.excitation is None else layer.excitation[:4])]
    assert all(t is not None for t in found)
    return cast(list[Tensor], found)


def _setting(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor, device="meta")


def _linear(chain: Chain, x: Tensor) -> Tensor:
    """A fully connected layer of x [N, C]."""
    weight, bias = chain.layers[0][1:3]
    assert bias is not None
    return F.linear(x, weight.flatten(1), bias.to(x.dtype))


def _run_eagerly(chain: Chain, x: Tensor) -> Tensor:
    """The chain by torch's own operators."""
    residual = x
    for layer in chain.layers:
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        size = (x.shape[2], x.shape[3])
        # Not layer.kernel_size: the tracer of torch 2.9 does not know a NamedTuple's properties.
        left, right, top, bottom = resolve_padding(layer.padding, size, weight.shape[2], layer.stride)
        symmetric = layer.padding != "same" and left == right == top == bottom
        if not symmetric:
            x = F.pad(x, [left, right, top, bottom])
        groups = x.shape[1] if layer.kind == "depthwise" else 1
        y = F.conv2d(x, weight, bias.to(x.dtype), layer.stride, left if symmetric else 0, 1, groups)
        x = activate(y, layer.act)
        if layer.excitation is not None:
            x = x * _gate(layer.excitation, x)
    if chain.residual:
        x = x + residual
    return F.adaptive_avg_pool2d(x, 1).flatten(1) if chain.pool else x


def _gate(excitation: Excitation, x: Tensor) -> Tensor:
    """Squeeze-and-excitation's gate [N, K, 1, 1] of a map."""
    w1, b1, w2, b2, act, gate = excitation
    assert b1 is not None
    assert b2 is not None
    hidden = activate(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1.to(x.dtype)), act)
    return gate_of(F.conv2d(hidden, w2, b2.to(x.dtype)), gate)
