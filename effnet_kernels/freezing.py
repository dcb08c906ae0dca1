"""freeze(): a trained network as an engine for inference."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import cpu
from effnet_kernels.batch_norm import scale_and_shift
from effnet_kernels.dispatch import BackendError
from effnet_kernels.folded import Excitation, Layer
from effnet_kernels.frozen import FrozenEfficientNet
from effnet_kernels.models.features import FeatureInfo
from effnet_kernels.modules.chain import ConvNorm, ExcitationLayers, Parts
from effnet_kernels.modules.operator_module import children_obstacle
from effnet_kernels.peer_blocks import name_of, unwrapped
from effnet_kernels.peer_networks import Network, read_network
from effnet_kernels.verification import (
    Observed,
    agree,
    detached_copy,
    first_difference,
    tensors_of,
    undisturbed,
)


def freeze(
    model: nn.Module,
    features: bool = False,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    verify: bool | Tensor = True,
) -> FrozenEfficientNet:
    """The network as an engine for inference, BatchNorm folded: one native call on the CPU, Triton kernels on a GPU.

    The engine has the model's weights of this moment; the model is left as it is. Whether it is in train or eval mode
    does not matter: the engine computes what it computes in eval mode. Dropout and stochastic depth are gone. Pooling
    and classifier may be modules of your own: what the engine does not know of them is copied, and computed by torch.

    Args:
        model: an EfficientNet: this package's, torchvision's, timm's or ``efficientnet_pytorch``'s, and torchvision's
            MobileNets and timm's other networks of the same classes; accelerated or not, compiled by ``torch.compile``
            or inside of ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``.
        features: whether the engine returns feature maps, as a backbone does: the last map of each resolution, the
            finest first, without the head. Models that return maps themselves keep to their own choice.
        dtype: of weights, images and outputs; the model's own if None. float32 on the CPU; float32, float16 or bfloat16
            on a GPU.
        cuda_graph: whether a GPU's launches are captured once for each shape of images, and replayed. The eight shapes
            used last keep their graphs.
        verify: whether a copy of the model and the engine have to agree on a small random batch, or the images
            [N, C, H, W] to compare them on. It costs about one inference of the model, in float64 up to 50 million
            parameters.

    Returns a module of images [N, C, H, W], of any batch size, resolution and strides, to what the model returns. It
    has no gradients, is pickled with its weights, may be called by several threads and exported. Autocast does not
    change what it computes in.

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
    folded = _fold(network, features)
    exact = FrozenEfficientNet(*folded, dtype=torch.float32)
    if verify is not False:
        _verify(model, network, folded, exact, None if verify is True else verify)
    if dtype is torch.float32 and not cuda_graph:
        return exact
    return FrozenEfficientNet(*folded, dtype=dtype, cuda_graph=cuda_graph)


class Folded(NamedTuple):
    """What an engine is made of; see :class:`FrozenEfficientNet`."""

    layers: list[Layer]
    blocks: list[tuple[int, int]]
    outputs: list[int]
    tail: nn.Module | None
    features_only: bool
    image_first: bool = False


def _fold(network: Network, features: bool) -> Folded:
    layers: list[Layer] = []
    blocks: list[tuple[int, int]] = []
    ends, strides = [], []
    for stage in ([network.stem], *network.stages):
        before = len(layers)
        for name, parts in stage:
            _append(layers, blocks, name, parts)
        ends.append(len(layers))
        strides.append(math.prod(layer.stride for layer in layers[before:]))
    maps = network.maps
    if maps is None and features:
        maps = FeatureInfo.of_layers([layers[end - 1].weight.shape[0] for end in ends], strides, None).layers()
    if maps is not None:
        return Folded(layers, blocks, [ends[i] for i in maps], None, True, network.image_first)
    assert network.tail is not None
    if network.head is not None:
        _append(layers, blocks, *network.head)
    tail = list(_flattened(network.tail))
    last = layers[-1]
    can_pool = last.weight.shape[-1] == 1 and last.stride == 1 and not last.depthwise and last.residual < 0
    pooled = _after_pooling(tail) if can_pool else None
    if pooled is not None:
        layers[-1] = last._replace(pool=True)
        tail = [(name, module) for name, module in pooled if not _is_plain(module, nn.Dropout, nn.Identity)]
        if len(tail) == 1 and _is_plain(tail[0][1], nn.Linear):
            linear: Any = tail.pop()[1]
            bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
            blocks.append((len(layers), len(layers) + 1))
            layers.append(Layer(linear.weight[:, :, None, None], bias))
    return Folded(layers, blocks, [len(layers)], _copied(tail) if tail else None, False)


def _is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, and does nothing but their forward."""
    return children_obstacle([("it", module, kinds)]) is None


def _flattened(modules: Mapping[str, nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order of their calls, with those of a plain sequence in its place."""
    for name, module in modules.items():
        if _is_plain(module, nn.Sequential):
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
    if flattens is False and rest and _is_plain(rest[0][1], nn.Flatten):
        flatten: Any = rest[0][1]
        return rest[1:] if (flatten.start_dim, flatten.end_dim) == (1, -1) else None
    return None


def _flattens(pool: nn.Module) -> bool | None:
    """Whether a mean over all pixels comes as [N, C], not as [N, C, 1, 1]; None for another module."""
    if _is_plain(pool, nn.AdaptiveAvgPool2d):
        return False
    inner: Any = pool._modules.get("pool")
    if name_of(type(pool)) != "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d" or inner is None:
        return None
    fast = name_of(type(inner)) == "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool"
    if not _is_plain(pool, type(pool)) or not _is_plain(inner, type(inner) if fast else nn.AdaptiveAvgPool2d):
        return None
    if fast and tuple(inner.dim) != (2, 3):
        return None
    behind = pool._modules["flatten"]
    if fast and inner.flatten:
        return True if _is_plain(behind, nn.Identity) else None
    return True if _is_plain(behind, nn.Flatten) else False if _is_plain(behind, nn.Identity) else None


def _copied(tail: list[tuple[str, nn.Module]]) -> nn.Module:
    """The user's own modules, in eval mode, with the weights of this moment."""
    return detached_copy(nn.Sequential(*(module for _, module in tail))).eval().requires_grad_(False)


def _verify(
    model: nn.Module, network: Network, folded: Folded, engine: FrozenEfficientNet, images: Tensor | None
) -> None:
    """Raises ValueError, with the first block that differs, where model and engine disagree on images."""
    blocks = [name for stage in network.stages for name, _ in stage]
    # Each gets what the one before it makes, beginning with the stem.
    behind = [network.head[0]] if network.head is not None else list(network.tail or ())[:1]
    observed = Observed(model, [*blocks, *behind])
    channels = network.stem[1].layers[0].conv.in_channels
    x, theirs, maps = observed.run_random(channels) if images is None else observed.run(images)
    if len(maps) != len(blocks) + len(behind):
        raise ValueError(f"expected the model to call its {len(blocks)} blocks once each, got {len(maps)} calls")
    if engine.features_only and network.maps is None:
        theirs = [y for y, (_, end) in zip(maps, folded.blocks, strict=True) if end in folded.outputs]
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


def _check(model: nn.Module, network: Network, dtype: torch.dtype | None, cuda_graph: bool) -> torch.dtype:
    """The engine's dtype, if what it reads of the model is where it can run."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    names = {id(t): name for name, t in named}
    read = [t for _, parts in _all_parts(network) for t in parts.tensors()]
    first = read[0]
    dtype = first.dtype if dtype is None else dtype
    on_gpu = first.device.type == "cuda"
    expected = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32,)
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
    return dtype


def _all_parts(network: Network) -> Iterator[tuple[str, Parts]]:
    yield network.stem
    for stage in network.stages:
        yield from stage
    if network.head is not None:
        yield network.head


def _append(layers: list[Layer], blocks: list[tuple[int, int]], name: str, parts: Parts) -> None:
    """Appends a block and its layers."""
    before = len(layers)
    for index, part in enumerate(parts.layers):
        layer = _layer(name, part)
        if parts.excitation is not None and index == len(parts.layers) - 2:
            layer = layer._replace(excitation=_excitation(parts.excitation))
        layers.append(layer)
    if parts.residual:
        layers[-1] = layers[-1]._replace(residual=before)
    blocks.append((before, len(layers)))


def _layer(name: str, part: ConvNorm) -> Layer:
    """The convolution with its BatchNorm folded in, in float64."""
    conv, norm = part.conv, part.norm
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name}: expected a BatchNorm with running statistics, got {norm}")
    depthwise = part.kind() == "depthwise"
    if not depthwise and conv.groups != 1:
        raise ValueError(f"{name}: expected a dense or a depthwise convolution, got {conv}")
    mean, rstd = norm.running_mean.double(), torch.rsqrt(norm.running_var.double() + norm.eps)
    scale, shift = scale_and_shift(mean, rstd, norm.weight, norm.bias)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    padding = part.padding
    return Layer(
        (conv.weight.double() * scale[:, None, None, None]).detach().float(),
        shift.detach().float(),
        depthwise,
        conv.stride[0],
        (padding, padding, padding, padding) if isinstance(padding, int) else padding,
        part.act,
    )


def _excitation(layers: ExcitationLayers) -> Excitation:
    fc1, fc2, act, gate = layers
    biases = [fc.weight.new_zeros(fc.out_channels) if fc.bias is None else fc.bias for fc in (fc1, fc2)]
    return Excitation(fc1.weight.flatten(1), biases[0], fc2.weight.flatten(1), biases[1], act, gate)
