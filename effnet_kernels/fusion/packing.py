"""Chains packed for inference on the CPU: one native call, while their parameters keep their values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from effnet_kernels.backends import profiling
from effnet_kernels.backends.cpu.memory import fingerprint, released_with_memory
from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion.spec import Chain


class _Packed(NamedTuple):
    """A network, or None where it does not compute the chains, and what its weights were."""

    network: Network | None
    layout: list[object]
    fingerprint: int

    def is_stale(self, tensors: list[Tensor]) -> bool:
        return self.network is not None and self.fingerprint != fingerprint(tensors)


class PackedChains:
    """The packed forms of the same chains: of their output and of its pooled one, in float32 and in bfloat16.

    Parameters may change at any time, and not every change can be seen: ``parameter.data.copy_()`` leaves no trace. So
    each call hashes them, which takes the time of reading them once, and packs them again where the hash is another.
    """

    def __init__(self, tensors: list[Tensor] | None = None) -> None:
        """``tensors`` are the chains', if they have the same at every call; without them each call's are asked."""
        self._tensors = tensors
        self._packed: dict[tuple[bool, torch.dtype], _Packed] = {}
        released_with_memory(self)

    def infer(self, chains: Sequence[Chain], x: Tensor) -> Tensor | None:
        """The last output of chains, of which each reads the one before, for x [N, C, H, W] on the CPU, in its dtype.

        That is float32, or bfloat16 where the instruction set has kernels for it (``cpu.runs_bf16()``). None where the
        chains cannot be packed.
        """
        pool = chains[-1].pool
        form, tensors = (pool, x.dtype), tensors_of(chains) if self._tensors is None else self._tensors
        packed, layout = self._packed.get(form), _layout(tensors)
        if packed is None or packed.layout != layout or packed.is_stale(tensors):
            # Threads that come here at once each pack their own, and the last is kept.
            packed = self._packed[form] = _pack(chains, tensors, layout, x.dtype)
        if packed.network is None:
            return None
        if profiling.enabled() and chains[0].layers[0].kind == "dense":
            # The others are recorded by the caller, who leaves a dense one to torch or to its primitive.
            profiling.record_convolutions(Chain(chains[0].layers[:1]), x.shape, dense=True)
        (y,) = packed.network.run(x, torch.channels_last)
        # A tensor of its own, as every output is.
        return y.flatten(1).clone() if pool else y

    def is_refused(self, chain: Chain, dtype: torch.dtype) -> bool:
        """Whether the last call in this dtype found that the chain, as its tensors are now, cannot be packed."""
        return any(
            form[1] is dtype and packed.network is None and packed.layout == _layout(chain.tensors())
            for form, packed in self._packed.items()
        )

    def forget(self) -> None:
        """Frees the packed weights; the next call packs them again."""
        self._packed = {}


# Packed chains by the weight of their first convolution, which this does not keep alive, and by their text.
_by_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_for(text: str, chain: Chain) -> PackedChains:
    """The packed forms of a chain that comes without its module, as the operators of :mod:`.custom_ops` get it.

    ``text`` says all of the chain but its tensors.
    """
    by_text: dict[str, PackedChains] = _by_weight.setdefault(chain.layers[0].weight, {})
    if text not in by_text:
        by_text[text] = PackedChains()
    return by_text[text]


def tensors_of(chains: Sequence[Chain]) -> list[Tensor]:
    """All parameters and running statistics of chains."""
    return [t for chain in chains for t in chain.tensors()]


def _layout(tensors: list[Tensor]) -> list[object]:
    return [(t.shape, t.stride(), t.dtype, t.is_cpu, t.is_neg()) for t in tensors]


def _pack(chains: Sequence[Chain], tensors: list[Tensor], layout: list[object], dtype: torch.dtype) -> _Packed:
    dtypes = {torch.float32, dtype}
    if not all(t.dtype in dtypes and t.is_cpu and not t.is_neg() and _is_dense(t) for t in tensors):
        return _Packed(None, layout, 0)
    # Before packing: a change in between is seen at the next call.
    hashed = fingerprint(tensors)
    try:
        return _Packed(Network(chains, [len(chains) - 1], dtype, winograd=False), layout, hashed)
    except ValueError:
        return _Packed(None, layout, hashed)


def _is_dense(t: Tensor) -> bool:
    """Whether the memory from the tensor's address on holds its values and nothing else."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
