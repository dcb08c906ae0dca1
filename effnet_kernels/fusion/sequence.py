"""Chains one behind the other at inference, computed together.

Called one by one, each of a network's chains takes the host's time to find out what runs it. On a small batch that is
longer than its kernels take.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import PRIMITIVES_BACKENDS
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion.autograd import cast, packed_dtypes
from effnet_kernels.fusion.forward import check_input, infer
from effnet_kernels.fusion.inspection import missing_kernel
from effnet_kernels.fusion.packing import PackedChains, tensors_of
from effnet_kernels.fusion.spec import Chain


class _Run(NamedTuple):
    """Chains whose launches are one plan on a GPU, or a single chain that begins with torch's dense convolution."""

    chains: list[Chain]
    tensors: list[Tensor | None]
    plans: Plans


class ChainSequence:
    """Chains of which each reads the output of the one before, with norms of eval mode and without stochastic depth.

    On the CPU they are one native call with packed weights; on a GPU those between dense convolutions are one launch
    plan.

    Attributes:
        missing_kernels: for each backend which convolution it has no kernels for, or None.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.chains = list(chains)
        self._tensors = tensors_of(chains)
        self._packed = PackedChains(self._tensors)
        self._runs = [_Run(run, [t for chain in run for t in chain.all_tensors()], Plans()) for run in _runs(chains)]
        self._too_large: set[torch.Size] = set()
        self.missing_kernels = {backend: missing_kernel(backend, chains) for backend in PRIMITIVES_BACKENDS}

    def infer(self, backend: Literal["cpu", "triton"], x: Tensor, pool: bool = False) -> Tensor | None:
        """The last output [N, K, H', W'] for x [N, C, H, W], or with ``pool`` its mean over all pixels, [N, K].

        The output is in channels-last strides and, as a chain's, in the dtype of x or of autocast. None where each
        chain has to be called by itself. Raises ValueError where x does not fit the first chain's weights.
        """
        check_input(self.chains[0], x)
        dtypes = select.chain_dtypes(backend, x)
        if backend == "cpu":
            return self._infer_natively(x, dtypes, pool)
        if x.shape in self._too_large:
            return None
        try:
            return self._infer_by_plans(x, dtypes, pool)
        except torch.OutOfMemoryError:
            # A pass holds all of the network's maps while its plan is recorded. One chain's are few.
            self._too_large.add(x.shape)
            return None

    def _infer_by_plans(self, x: Tensor, dtypes: tuple[torch.dtype, torch.dtype], pool: bool) -> Tensor:
        computed, returned = dtypes
        y = cast("triton", as_map(x), computed)
        primitives = select.primitives_of("triton")
        for run in self._runs:
            chains = _pooled(run.chains) if pool and run is self._runs[-1] else run.chains
            y = infer(primitives, chains, y, run.plans, run.tensors)
        return cast("triton", y, returned)

    def _infer_natively(self, x: Tensor, dtypes: tuple[torch.dtype, torch.dtype], pool: bool) -> Tensor | None:
        if dtypes[0] is not dtypes[1] and any(t.dtype is not torch.float32 for t in self._tensors):
            # Under autocast, with parameters that it would cast.
            return None
        chains = _pooled(self.chains) if pool else self.chains
        with select.without_autocast(x):
            for dtype in packed_dtypes(dtypes):
                y = self._packed.infer(chains, cast("cpu", as_map(x), dtype))
                if y is not None:
                    return cast("cpu", y, dtypes[1])
        return None


def _pooled(chains: list[Chain]) -> list[Chain]:
    return [*chains[:-1], chains[-1]._replace(pool=True)]


def _runs(chains: Sequence[Chain]) -> list[list[Chain]]:
    runs: list[list[Chain]] = []
    for chain in chains:
        dense = chain.layers[0].kind == "dense"
        if not runs or dense or runs[-1][0].layers[0].kind == "dense":
            runs.append([])
        runs[-1].append(chain)
    return runs
