"""Chains one behind the other at inference, computed together.

Called one by one, each of a network's chains takes the host's time to find out what runs it. On a small batch that is
longer than its kernels take.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.backends import select
from effnet_kernels.backends.base import PRIMITIVES_BACKENDS
from effnet_kernels.backends.cpu.memory import released_with_memory
from effnet_kernels.backends.operands import as_map
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion.autograd import cast, packed_dtypes
from effnet_kernels.fusion.forward import check_input, infer
from effnet_kernels.fusion.inspection import missing_kernel
from effnet_kernels.fusion.packing import PackedChains, tensors_of
from effnet_kernels.fusion.spec import Chain


class _Run(NamedTuple):
    """Chains whose launches are one plan on a GPU; one that begins with torch's dense convolution is by itself."""

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
        self._weights = [t for chain in chains for t in chain.of_convolutions()]
        self._packed = PackedChains(self._tensors)
        self._runs = [_run_of(run) for run in _runs(chains)]
        # Of each chain by itself, for images of these sizes.
        self._single_runs = [_run_of([chain]) for chain in chains]
        self._too_large: set[torch.Size] = set()
        released_with_memory(self)
        self.missing_kernels = {backend: missing_kernel(backend, chains) for backend in PRIMITIVES_BACKENDS}

    def infer_natively(self, x: Tensor, pool: bool = False) -> Tensor | None:
        """The last output [N, K, H', W'] for x [N, C, H, W] on the CPU; with ``pool`` its mean over all pixels, [N, K].

        The output is in channels-last strides and, as a chain's, in the dtype of x or of autocast. None where each
        chain has to be called by itself. Raises ValueError where x does not fit the first chain's weights.
        """
        check_input(self.chains[0], x)
        dtypes = select.chain_dtypes("cpu", x)
        # Under autocast, parameters that it would cast are torch's to compute with; without, those of another dtype are
        # an error of the caller's.
        own, dtype = (self._weights, x.dtype) if dtypes[0] is dtypes[1] else (self._tensors, torch.float32)
        if any(t.dtype is not dtype for t in own):
            return None
        chains = _pooled(self.chains) if pool else self.chains
        with select.without_autocast(x):
            for dtype in packed_dtypes(dtypes):
                y = self._packed.infer(chains, cast("cpu", as_map(x), dtype))
                if y is not None:
                    return cast("cpu", y, dtypes[1])
        return None

    def infer_on_gpu(self, x: Tensor, pool: bool = False) -> Tensor:
        """The same by the Triton kernels, which compute every chain."""
        check_input(self.chains[0], x)
        if x.shape not in self._too_large:
            try:
                return _infer_by_plans(self._runs, x, pool)
            except torch.OutOfMemoryError:
                # A pass holds all of the network's maps while its plan is recorded. One chain's are few.
                self._too_large.add(x.shape)
        return _infer_by_plans(self._single_runs, x, pool)

    def forget(self) -> None:
        """Tries sizes again for which there was too little memory."""
        self._too_large.clear()


def _infer_by_plans(runs: list[_Run], x: Tensor, pool: bool) -> Tensor:
    computed, returned = select.chain_dtypes("triton", x)
    y = cast("triton", as_map(x), computed)
    primitives = select.primitives_of("triton")
    for run in runs:
        chains = _pooled(run.chains) if pool and run is runs[-1] else run.chains
        y = infer(primitives, chains, y, run.plans, run.tensors)
    return cast("triton", y, returned)


def _run_of(chains: list[Chain]) -> _Run:
    return _Run(chains, [t for chain in chains for t in chain.all_tensors()], Plans())


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
