"""A sequence of fused modules at inference, computed as one where nothing observes the calls that this leaves out."""

import torch
from torch import Tensor, nn

from effnet_kernels.backends import profiling, select
from effnet_kernels.backends.select import Call
from effnet_kernels.fusion.accelerated_class import is_accelerated, original_of
from effnet_kernels.fusion.cache import Snapshots
from effnet_kernels.fusion.inspection import has_hook, is_plain, methods_of, promoted_residual
from effnet_kernels.fusion.sequence import ChainSequence
from effnet_kernels.fusion.spec import Chain, are_the_same
from effnet_kernels.modules.conv_bn_act import ConvBnAct
from effnet_kernels.modules.fused_mbconv import FusedMBConv
from effnet_kernels.modules.fused_module import FusedModule
from effnet_kernels.modules.mbconv import MBConv

# False where modules have to be called.
_sequences: Snapshots[ChainSequence | bool] = Snapshots()


def call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, computed as one where the module is torch's plain sequence of fused ones."""
    observed = torch.is_grad_enabled() or torch.compiler.is_compiling()
    y = infer(module, x) if not observed and _is_called_plainly(module, nn.Sequential) else None
    if y is not None:
        return y
    # Hooks look at maps in the strides that torch's modules have by default.
    called: Tensor = module(x.contiguous() if module._forward_hooks else x)
    return called


def infer(sequence: nn.Module, x: Tensor, pool: bool = False) -> Tensor | None:
    """The output of a sequence's modules, one behind the other, in eval mode and without gradients.

    With ``pool`` the output's mean over all pixels, [N, K]. None where each module has to be called by itself.
    """
    if torch.is_grad_enabled() or sequence.training or torch.compiler.is_compiling():
        return None
    if select.interception(x) is not None or select.global_hook() is not None or profiling.enabled():
        return None
    force, call = select.forced(), Call.of(x)
    backend = select.backend_for(call, force)
    in_bf16 = select.is_in_bf16(x)
    reason = select.bf16_fallback_reason(call) if in_bf16 else select.fallback_reason(backend, call)
    if force == "torch" or backend == "reference" or reason is not None:
        return None
    found = _sequences.get(sequence)
    if found is None:
        # While there is a hook inside, nothing that is kept holds.
        if any(map(has_hook, list(sequence.modules())[1:])):
            return None
        chains, before = _lower(sequence), _sequences.last(sequence)
        if chains and isinstance(before, ChainSequence) and are_the_same(before.chains, chains):
            # What has changed is of no consequence, and the chains are packed already.
            found = before
        else:
            found = ChainSequence(chains) if chains else False
        _sequences.keep(sequence, found)
    if isinstance(found, bool) or found.missing_kernels[backend] is not None:
        return None
    if promoted_residual(found.chains, call) is not None:
        return None
    return found.infer_natively(x, pool) if backend == "cpu" else found.infer_on_gpu(x, pool)


def _lower(sequence: nn.Module) -> list[Chain]:
    """The chains of a sequence's modules; none where these have to be called."""
    if any(module.training for module in sequence.modules()):
        return []
    # Its forward is the caller, but it need not be the one of its class.
    if methods_of(type(sequence))[1] is not None:
        return []
    chains: list[Chain] = []
    for module in fused_modules(sequence):
        if module is None:
            return []
        spec = module.lowered()
        if isinstance(spec, str) or spec.chain.batch_statistics:
            return []
        if chains and chains[-1].layers[-1].out_channels != spec.chain.layers[0].in_channels:
            return []
        chains.append(spec.chain)
    return chains


def fused_modules(sequence: nn.Module) -> list[FusedModule | None]:
    """The fused modules in a sequence and in the sequences in it; None for any other module."""
    found: list[FusedModule | None] = []
    for child in sequence._modules.values():
        if child is not None and _is_called_plainly(child, nn.Sequential):
            found += fused_modules(child)
        elif isinstance(child, FusedModule) and _returns_what_is_fused(child):
            found.append(child)
        else:
            found.append(None)
    return found


def _returns_what_is_fused(module: FusedModule) -> bool:
    """Whether the module's call returns what its method ``fused`` does, wherever that is not None."""
    kinds = (original_of(type(module)),) if is_accelerated(type(module)) else (ConvBnAct, MBConv, FusedMBConv)
    return _is_called_plainly(module, *kinds)


def _is_called_plainly(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """:func:`is_plain`, of a module that was not compiled by itself: that is called as it was compiled."""
    return module._compiled_call_impl is None and is_plain(module, *kinds)
