"""freeze(): a trained network as an engine for inference."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import cpu
from effnet_kernels.backends.batch_norm import folded
from effnet_kernels.backends.select import BackendError
from effnet_kernels.fusion.inspection import is_plain
from effnet_kernels.fusion.spec import Chain, Layer
from effnet_kernels.inference.engine import FrozenEfficientNet
from effnet_kernels.interop.adapters import NetworkParts, name_of, unwrapped
from effnet_kernels.interop.networks import read_network
from effnet_kernels.interop.verification import (
    Observed,
    agree,
    detached_copy,
    first_difference,
    tensors_of,
    undisturbed,
)
from effnet_kernels.models.features import FeatureInfo


def freeze(
    model: nn.Module,
    features_only: bool = False,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    verify: bool | Tensor = True,
) -> FrozenEfficientNet:
    """The network as an engine for inference, BatchNorm folded: one native call on the CPU, Triton kernels on a GPU.

    The engine has the model's weights of this moment; the model is left as it is, and may be in train or eval mode. The
    engine computes its output in eval mode, without dropout and stochastic depth. Pooling and classifier may be modules
    of your own: those that the engine does not know are copied, and torch computes them.

    Args:
        model: an EfficientNet: this package's, torchvision's, timm's or ``efficientnet_pytorch``'s, and torchvision's
            MobileNets and timm's other networks of the same classes; accelerated or not, compiled by ``torch.compile``
            or inside of ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``.
        features_only: whether the engine returns feature maps, as a backbone does: the last map of each resolution, the
            finest first, without the head. Models that return maps themselves keep to their own choice.
        dtype: of weights, images and outputs; the model's own if None. float32, float16 or bfloat16 on a GPU; float32
            or bfloat16 on the CPU, which needs AVX512-BF16 for it and takes AMX if it can. In bfloat16 on the CPU, maps
            and weights are rounded; products are summed in float32, and activations, depthwise convolutions and
            squeeze-and-excitation are computed in it. Images may be bfloat16 or float32, and logits, features and maps
            are of the image's dtype, with the values of bfloat16 in either.
        cuda_graph: whether a GPU's launches are captured once for each shape of images, and replayed. The eight shapes
            used last keep their graphs.
        verify: whether a copy of the model and the engine have to agree on a small random batch, or the images
            [N, C, H, W] to compare them on. It costs about one inference of the model, in float64 up to 50 million
            parameters.

    Returns a module of images [N, C, H, W], of any batch size, resolution and strides, to the model's output. It has no
    gradients, is pickled with its weights, may be called by several threads and exported. Autocast does not change the
    dtype that it computes in.

    On the CPU in float32, 3x3 convolutions of stride 1 over 16 channels and more (V2's) are computed by Winograd's
    transforms (Lavin and Gray, 2016, section 4): sums are taken in another order, and an infinity or a NaN spreads to
    the other pixels of its 6x6 tile. ``EFFNET_KERNELS_WINOGRAD=0``, set before the first call, turns that off.

    Raises:
        TypeError: for another model.
        ValueError: for a part that the engine does not know, a hook or a replaced method by its name; for a dtype or
            device that it does not run on; where model and engine disagree, with the first block that differs.
        BackendError: where the native extension is missing.
    """
    if not isinstance(verify, bool | Tensor):
        raise TypeError(f"verify: expected a bool or images [N, C, H, W], got {type(verify).__name__}")
    model = unwrapped(model)
    network = read_network(model)
    dtype = _check(model, network, dtype, cuda_graph)
    folded = _fold(network, features_only)
    exact = FrozenEfficientNet(*folded, dtype=torch.float32)
    if verify is not False:
        _verify(model, network, folded, exact, None if verify is True else verify)
    if dtype is torch.float32 and not cuda_graph:
        return exact
    return FrozenEfficientNet(*folded, dtype=dtype, cuda_graph=cuda_graph)


class Folded(NamedTuple):
    """The parts of an engine; see :class:`FrozenEfficientNet`."""

    chains: list[Chain]
    outputs: list[int]
    tail: nn.Module | None
    features_only: bool
    image_first: bool = False


def _fold(network: NetworkParts, features_only: bool) -> Folded:
    chains: list[Chain] = []
    ends, strides = [], []
    for stage in ([network.stem], *network.stages):
        before = len(chains)
        chains += [_fold_chain(name, chain) for name, chain in stage]
        ends.append(len(chains) - 1)
        strides.append(math.prod(layer.stride for chain in chains[before:] for layer in chain.layers))
    maps = network.maps
    if maps is None and features_only:
        maps = FeatureInfo.of_layers([chains[end].layers[-1].out_channels for end in ends], strides, None).layers()
    if maps is not None:
        return Folded(chains, [ends[i] for i in maps], None, True, network.image_first)
    assert network.tail is not None
    if network.head is not None:
        chains.append(_fold_chain(*network.head))
    tail = list(_flattened(network.tail))
    can_pool = chains[-1].layers[-1].kind == "pointwise" and not chains[-1].residual
    pooled = _after_pooling(tail) if can_pool else None
    if pooled is not None:
        chains[-1] = chains[-1]._replace(pool=True)
        tail = [(name, module) for name, module in pooled if not is_plain(module, nn.Dropout, nn.Identity)]
        if len(tail) == 1 and is_plain(tail[0][1], nn.Linear):
            linear: Any = tail.pop()[1]
            bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
            chains.append(Chain((Layer("pointwise", linear.weight[:, :, None, None], bias),)))
    return Folded(chains, [len(chains) - 1], _copied(tail) if tail else None, False)


def _flattened(modules: Mapping[str, nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order of their calls, with those of a plain sequence in its place."""
    for name, module in modules.items():
        if is_plain(module, nn.Sequential):
            children = {key: child for key, child in module._modules.items() if child is not None}
            yield from _flattened(children, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _after_pooling(tail: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]] | None:
    """What follows a mean over all pixels and the flattening to [N, C]; None where the tail begins otherwise."""
    if not tail:
        return None
    (_, pool), *rest = tail
    flattens = _flattens(pool)
    if flattens:
        return rest
    if flattens is False and rest and is_plain(rest[0][1], nn.Flatten):
        flatten: Any = rest[0][1]
        return rest[1:] if (flatten.start_dim, flatten.end_dim) == (1, -1) else None
    return None


def _flattens(pool: nn.Module) -> bool | None:
    """Whether a mean over all pixels comes as [N, C], not as [N, C, 1, 1]; None for another module."""
    if is_plain(pool, nn.AdaptiveAvgPool2d):
        return False
    inner: Any = pool._modules.get("pool")
    if name_of(type(pool)) != "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d" or inner is None:
        return None
    fast = name_of(type(inner)) == "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool"
    if not is_plain(pool, type(pool)) or not is_plain(inner, type(inner) if fast else nn.AdaptiveAvgPool2d):
        return None
    if fast and tuple(inner.dim) != (2, 3):
        return None
    behind = pool._modules["flatten"]
    if fast and inner.flatten:
        return True if is_plain(behind, nn.Identity) else None
    return True if is_plain(behind, nn.Flatten) else False if is_plain(behind, nn.Identity) else None


def _copied(tail: list[tuple[str, nn.Module]]) -> nn.Module:
    """The user's own modules, in eval mode, with the weights of this moment."""
    return detached_copy(nn.Sequential(*(module for _, module in tail))).eval().requires_grad_(False)


def _verify(
    model: nn.Module, network: NetworkParts, folded: Folded, engine: FrozenEfficientNet, images: Tensor | None
) -> None:
    """Raises ValueError, with the first block that differs, where model and engine disagree on images."""
    blocks = [name for stage in network.stages for name, _ in stage]
    # Each gets the output of the one before, the first that of the stem.
    behind = [network.head[0]] if network.head is not None else list(network.tail or ())[:1]
    observed = Observed(model, [*blocks, *behind])
    channels = network.stem[1].layers[0].in_channels
    x, theirs, maps = observed.run_random(channels) if images is None else observed.run(images)
    if len(maps) != len(blocks) + len(behind):
        raise ValueError(f"expected the model to call its {len(blocks)} blocks once each, got {len(maps)} calls")
    if engine.features_only and network.maps is None:
        theirs = [maps[index] for index in folded.outputs]
    x = x.to(engine.folded.weight.device, torch.float32)
    with undisturbed(x.device):
        ours = tensors_of(engine(x))
        if agree(ours, theirs):
            return
        found = first_difference([y for y, _ in engine.folded.each(x)], maps, [network.stem[0], *blocks])
    raise ValueError(
        f"{found}: the engine would compute something else than the model, on images of shape {tuple(x.shape)}; "
        "verify=False gives it unseen"
    )


def _check(model: nn.Module, network: NetworkParts, dtype: torch.dtype | None, cuda_graph: bool) -> torch.dtype:
    """The engine's dtype; raises an error where the tensors that it reads are not where it can run."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    names = {id(t): name for name, t in named}
    read = [t for chain in _chains(network) for t in chain.tensors()]
    first = read[0]
    dtype = first.dtype if dtype is None else dtype
    on_gpu = first.device.type == "cuda"
    expected = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32, torch.bfloat16)
    wanted, place = " or ".join(str(t) for t in expected), "a GPU" if on_gpu else "the CPU"
    for tensor in read:
        if tensor.device != first.device or first.device.type not in ("cpu", "cuda") or tensor.dtype not in expected:
            name = names.get(id(tensor), "a tensor")
            raise ValueError(f"{name}: expected {wanted} on {place}, got {tensor.dtype} on {tensor.device}")
    if dtype not in expected:
        raise ValueError(f"dtype: expected {wanted} on {place}, got {dtype}")
    if cuda_graph and not on_gpu:
        raise ValueError(f"cuda_graph: expected a model on a GPU, got one on {first.device}")
    if not on_gpu and (reason := cpu.unavailable_reason()) is not None:
        raise BackendError(f"a frozen network on the CPU needs the native extension: {reason}")
    if not on_gpu and dtype is torch.bfloat16:
        try:
            cpu.check_bf16()
        except ValueError as error:
            raise ValueError(f"dtype: {error}; torch.float32 runs on all of them") from None
    return dtype


def _chains(network: NetworkParts) -> Iterator[Chain]:
    for named in ([network.stem], *network.stages, [] if network.head is None else [network.head]):
        yield from (chain for _, chain in named)


def _fold_chain(name: str, chain: Chain) -> Chain:
    return chain._replace(layers=tuple(_fold_layer(name, layer) for layer in chain.layers))


def _fold_layer(name: str, layer: Layer) -> Layer:
    """The layer with its BatchNorm folded into weight and bias, in float64, as it normalises in eval mode."""
    norm = layer.norm
    if norm is None or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name}: expected a BatchNorm with running statistics, got one without")
    scale, shift = folded(norm, layer.bias)
    return layer._replace(
        weight=(layer.weight.double() * scale[:, None, None, None]).detach().float(),
        bias=shift.detach().float(),
        norm=None,
        excitation=None if layer.excitation is None else layer.excitation.with_biases(),
    )
