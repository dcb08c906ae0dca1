"""Modules that run as one fused chain where a backend's kernels can, and as their inner modules elsewhere."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import cpu, select
from effnet_kernels.backends.cpu.dense import convolves_patches
from effnet_kernels.backends.select import Backend, BackendError, Call
from effnet_kernels.backends.triton.plans import Plans
from effnet_kernels.fusion import autograd
from effnet_kernels.fusion.cache import Snapshots
from effnet_kernels.fusion.inspection import Unsupported, has_hook, missing_kernel, promoted_residual
from effnet_kernels.fusion.lowering import ChainSpec
from effnet_kernels.fusion.packing import PackedChains
from effnet_kernels.fusion.spec import Chain, are_the_same


class Decision(NamedTuple):
    """What runs a module.

    Attributes:
        backend: "torch" where the inner modules run as torch has them.
        fallback_reason: why they do, or None.
        spec: what the backend's kernels compute, or None.
    """

    backend: Backend
    fallback_reason: str | None = None
    spec: ChainSpec | None = None


class FusedModule(nn.Module):
    """Base of the modules with a fused chain.

    A subclass has :meth:`chain_spec`. Its ``forward`` returns what :meth:`fused` does, or calls its inner modules where
    that is None.
    """

    keeps_memory_format: ClassVar[bool] = True
    """Whether a fused output has the input's memory format; else it is in channels-last strides."""

    def chain_spec(self) -> ChainSpec:
        """What the module computes; raises Unsupported where no kernel computes a part of it."""
        raise NotImplementedError

    def fused(self, input: Tensor, *arguments: Any, pool: bool = False, **named: Any) -> Tensor | None:
        """The module's output, computed as one fused chain; None where its inner modules have to run.

        With ``pool`` the output's mean over all pixels, [N, K]. Further arguments go to stochastic depth.
        """
        in_bf16 = select.is_in_bf16(input)
        if in_bf16 and not select.infers_in_bf16():
            return None
        decision = self.choose(input)
        if decision.spec is None or decision.backend == "torch":
            return None
        x = autograd.channels_last(input)
        chain = decision.spec.chain._replace(pool=True) if pool else decision.spec.chain
        y: Tensor | None
        if in_bf16:
            y = autograd.infer_packed(chain, x, decision.spec.packed)
        else:
            drop_path_scale = decision.spec.drop_path_scale(x, *arguments, **named)
            spec = decision.spec
            y = autograd.run(decision.backend, chain, x, drop_path_scale, spec.packed, spec.plans)
        if y is None or pool:
            return y
        if self._forward_hooks:
            # Who looks at a map expects it in the strides that torch's modules have by default.
            return y.contiguous()
        if not self.keeps_memory_format:
            return y
        return y.contiguous(memory_format=memory_format(input))

    def given_to_hooks(self, input: Tensor) -> Tensor:
        """The input for the inner modules: in the strides that torch's have by default, where hooks look at them.

        Some hooks want them (per-sample gradients by Opacus, ``view``), and so do backward hooks of torch's: on
        a single image in channels-last strides the gradients of a BatchNorm that has one are wrong.
        """
        if torch.compiler.is_compiling() or select.interception(input) is not None:
            return input
        return input.contiguous() if any(map(has_hook, self.modules())) else input

    def choose(self, x: Tensor) -> Decision:
        """What runs the module on ``x``, and why."""
        intercepted = select.interception(x)
        if intercepted is not None:
            # Nothing of the module is looked at: a tracer would take the questions into its graph.
            return Decision("torch", intercepted)
        return self.decide(Call.of(x))

    def decide(self, call: Call) -> Decision:
        """:meth:`choose` from the facts of a call instead of a tensor; raises BackendError where one is forced."""
        force = select.forced()
        if force == "torch":
            return Decision("torch", "forced")
        reason = call.unusual or select.global_hook()
        if reason is not None:
            return Decision("torch", reason)
        spec = self.lowered()
        if isinstance(spec, str):
            return Decision("torch", spec)
        backend = select.backend_for(call, force)
        reason = select.fallback_reason(backend, call)
        if reason is not None and force is None and call.dtype is torch.bfloat16 and backend == "cpu":
            reason = select.bf16_fallback_reason(call) or _unpacked(spec)
        elif reason is None and backend == "cpu" and torch.is_autocast_enabled("cpu"):
            # Without autocast parameters of another dtype than the input's are an error of the caller's.
            reason = _parameters_of_other_dtypes(spec.chain)
        reason = reason or promoted_residual([spec.chain], call)
        if reason is not None and force == backend:
            raise BackendError(f"backend {force!r} was forced but cannot run {type(self).__name__}: {reason}")
        reason = reason or missing_kernel(backend, [spec.chain])
        return Decision("torch", reason) if reason is not None else Decision(backend, None, spec)

    def lowered(self) -> ChainSpec | str:
        """:meth:`chain_spec`, or the reason why there is none; found out anew where the module's inside has changed."""
        if torch.compiler.is_compiling():
            return self._lower()
        found = _lowered.get(self)
        if found is None:
            found = self._lower()
            if not isinstance(found, str):
                before = _lowered.last(self)
                if isinstance(before, ChainSpec) and are_the_same(before.chain, found.chain):
                    # What has changed is of no consequence, and the chain is packed already.
                    found = found._replace(packed=before.packed, plans=before.plans)
                else:
                    found = found._replace(packed=PackedChains(found.chain.tensors()), plans=Plans())
            _lowered.keep(self, found)
        return found

    def _lower(self) -> ChainSpec | str:
        try:
            return self.chain_spec()
        except Unsupported as reason:
            return str(reason)


_lowered: Snapshots[ChainSpec | str] = Snapshots()


def _unpacked(spec: ChainSpec) -> str | None:
    """Why no packed network infers a chain in bfloat16, or None; the native primitives do not compute in it."""
    if spec.chain.batch_statistics:
        return "the native kernels compute in float32, not bfloat16, where BatchNorm takes the batch's statistics"
    if any(t.dtype != torch.bfloat16 for t in spec.chain.of_convolutions()):
        return "the input is in bfloat16, and weights are not"
    if spec.packed is None or spec.packed.is_refused(spec.chain, torch.bfloat16):
        return "the native kernels compute in float32, not bfloat16, what cannot be packed"
    return None


def _parameters_of_other_dtypes(chain: Chain) -> str | None:
    """Why the native kernels cannot compute a chain whose input is cast for them, or None: they cast no parameters."""
    for t in chain.tensors():
        if t.dtype != torch.float32:
            return f"the native kernels compute with parameters in float32, not {str(t.dtype).removeprefix('torch.')}"
    return None


def description(decision: Decision) -> str:
    """What runs a module, in a few words; the reason where torch does."""
    if decision.backend == "torch" or decision.spec is None:
        return decision.fallback_reason or "torch"
    if decision.backend == "reference":
        kernels = "the reference, in plain PyTorch"
    elif decision.backend == "cpu":
        kernels = f"fused native kernels ({cpu.isa()})"
    else:
        kernels = "fused Triton kernels"
    first = decision.spec.chain.layers[0]
    if first.kind != "dense" or (decision.backend == "cpu" and convolves_patches(first.weight)):
        return kernels
    if decision.backend == "cpu":
        return f"in training the dense convolution by torch, the rest by {kernels}"
    return f"the dense convolution by torch, the rest by {kernels}"


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where the strides are that and nothing else (a 1x1 map's are both), else contiguous."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
