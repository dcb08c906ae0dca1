"""freeze(): a trained network as an engine for inference."""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import cpu, dispatch
from effnet_kernels.cpu.network import Network, StepProfile
from effnet_kernels.cuda_graphs import GraphCache
from effnet_kernels.dispatch import BackendError
from effnet_kernels.folded import Excitation, Layer
from effnet_kernels.folded_network import FoldedNetwork
from effnet_kernels.models.features import FeatureInfo, check_images
from effnet_kernels.modules.chain import ConvNorm, ExcitationLayers, Parts
from effnet_kernels.modules.operator_module import memory_format
from effnet_kernels.peer_networks import read_network


def freeze(
    model: nn.Module, features: bool = False, dtype: torch.dtype | None = None, cuda_graph: bool = False
) -> "FrozenEfficientNet":
    """The network as an engine for inference, BatchNorm folded: one native call on the CPU, Triton kernels on a GPU.

    The engine has the model's weights of this moment; the model is left as it is. Whether it is in train or eval mode
    does not matter: the engine computes what it computes in eval mode. Dropout and stochastic depth are gone.

    Args:
        model: an EfficientNet: this package's, torchvision's, timm's or ``efficientnet_pytorch``'s, and torchvision's
            MobileNets and timm's other networks of the same class; accelerated or not. A classifier that is not a
            linear layer stays a module.
        features: whether the engine returns feature maps, as a backbone does: the last map of each resolution, the
            finest first, without the head. Models that return maps themselves keep to their own choice.
        dtype: of weights, images and outputs; the model's own if None. float32 on the CPU; float32, float16 or bfloat16
            on a GPU.
        cuda_graph: whether a GPU's launches are captured once for each shape of images, and replayed. The eight shapes
            used last keep their graphs.

    Returns a module of images [N, C, H, W], of any batch size, resolution and strides, to what the model returns. It
    has no gradients, is pickled with its weights, may be called by several threads and exported. Autocast does not
    change what it computes in.

    Raises:
        TypeError: for another model.
        ValueError: for a part that the engine does not know, or a dtype or device that it does not run on.
        BackendError: where the native extension is missing.
    """
    network = read_network(model)
    dtype = _check(model, dtype, cuda_graph)
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
        return FrozenEfficientNet(layers, blocks, [ends[i] for i in maps], dtype, None, True, cuda_graph)
    if network.head is None:
        raise ValueError("expected a network with a classifier, or features=True")
    _append(layers, blocks, *network.head)
    if layers[-1].weight.shape[-1] != 1:
        raise ValueError(
            f"{network.head[0]}: expected a 1x1 convolution as head, got {network.head[1].layers[-1].conv}"
        )
    layers[-1] = layers[-1]._replace(pool=True)
    classifier = network.classifier
    if type(classifier) is nn.Linear:
        bias = torch.zeros_like(classifier.weight[:, 0]) if classifier.bias is None else classifier.bias
        blocks.append((len(layers), len(layers) + 1))
        layers.append(Layer(classifier.weight[:, :, None, None], bias))
    left = None if type(classifier) in (nn.Linear, nn.Identity) else copy.deepcopy(classifier)
    return FrozenEfficientNet(layers, blocks, [len(layers)], dtype, left, False, cuda_graph)


def _check(model: nn.Module, dtype: torch.dtype | None, cuda_graph: bool) -> torch.dtype:
    """The engine's dtype, if it can be frozen where the model is."""
    floats = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    first = next(iter(floats.values()))
    dtype = first.dtype if dtype is None else dtype
    on_gpu = first.device.type == "cuda"
    expected = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32,)
    place = "a GPU" if on_gpu else "the CPU"
    for name, tensor in floats.items():
        if tensor.device != first.device or first.device.type not in ("cpu", "cuda") or tensor.dtype not in expected:
            wanted = " or ".join(str(t) for t in expected)
            raise ValueError(f"{name}: expected {wanted} on {place}, got {tensor.dtype} on {tensor.device}")
    if dtype not in expected:
        raise ValueError(f"dtype: expected {' or '.join(str(t) for t in expected)} on {place}, got {dtype}")
    if cuda_graph and not on_gpu:
        raise ValueError(f"cuda_graph: expected a model on a GPU, got one on {first.device}")
    if not on_gpu:
        _check_extension()
    return dtype


def _check_extension() -> None:
    reason = cpu.unavailable_reason()
    if reason is not None:
        raise BackendError(f"a frozen network on the CPU needs the native extension: {reason}")


# Of what is made at a first call, which several threads may make at once.
_lock = threading.Lock()


class ProfileRow(NamedTuple):
    """One step of a frozen engine.

    Attributes:
        name: the layers that the step computes.
        milliseconds: of all images together, the median over the repetitions.
        gflops: 2e-9 times the multiply-adds a second.
        of_peak: gflops over what as many threads reach that multiply and add in registers, measured by the same call.
        share: of the whole time.
    """

    name: str
    milliseconds: float
    gflops: float
    of_peak: float
    share: float


class Profile(list[ProfileRow]):
    """The steps of a frozen engine in order; printed, it is a table."""

    def __str__(self) -> str:
        width = max(len(row.name) for row in self)
        lines = [f"{'step':{width}}  {'ms':>8}  {'GFLOP/s':>8}  {'of peak':>8}  {'of time':>8}"]
        for row in self:
            lines.append(
                f"{row.name:{width}}  {row.milliseconds:8.3f}  {row.gflops:8.1f}  {row.of_peak:8.1%}  {row.share:8.1%}"
            )
        lines.append(
            f"{'all':{width}}  {sum(row.milliseconds for row in self):8.3f}  "
            f"{sum(row.gflops * row.share for row in self):8.1f}  {sum(row.of_peak * row.share for row in self):8.1%}"
        )
        return "\n".join(lines)


class FrozenEfficientNet(nn.Module):
    """What :func:`freeze` returns.

    Args:
        layers, blocks, outputs, dtype: see :class:`FoldedNetwork`.
        classifier: what torch computes of the pooled features, or None.
        features_only: whether the outputs are maps.
        cuda_graph: whether a GPU's launches are replayed.

    Shapes: images [N, C, H, W] in any strides, to logits [N, num_classes], pooled features [N, num_features] or a list
    of feature maps in the image's memory format.
    Raises ValueError or TypeError for other images, RuntimeError for images that require gradients.
    """

    _native: Network | None
    _graphs: GraphCache | None

    def __init__(
        self,
        layers: Sequence[Layer],
        blocks: Sequence[tuple[int, int]],
        outputs: Sequence[int],
        dtype: torch.dtype,
        classifier: nn.Module | None,
        features_only: bool,
        cuda_graph: bool,
    ) -> None:
        super().__init__()
        self.folded = FoldedNetwork(layers, blocks, outputs, dtype)
        self.classifier = None if classifier is None else classifier.eval().to(dtype).requires_grad_(False)
        self.features_only = features_only
        self.cuda_graph = cuda_graph
        self._forget()

    def forward(self, x: Tensor) -> Any:
        check_images(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("expected an image without gradients: a frozen network only infers")
        outputs = self._outputs(x)
        if self.features_only:
            return outputs
        y = outputs[0].flatten(1)
        return y if self.classifier is None else self.classifier(y)

    def _outputs(self, x: Tensor) -> list[Tensor]:
        strides = memory_format(x) if self.features_only else torch.contiguous_format
        traced = torch.compiler.is_compiling() or dispatch.interception(x) is not None
        if self._is_native() and not traced:
            return self.native().run(x, strides)
        run: Callable[[Tensor], list[Tensor]] = self.folded
        on_gpu = self.folded.weight.device.type == "cuda"
        # Inside of a capture the launches become part of the caller's graph.
        if self.cuda_graph and on_gpu and not traced and not torch.cuda.is_current_stream_capturing():
            self.folded.check(x)
            run = self.graphs()
        return [y.contiguous(memory_format=strides) if y.dim() == 4 else y for y in run(x)]

    def _is_native(self) -> bool:
        weight = self.folded.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32

    def native(self) -> Network:
        """The engine of the CPU, packed at the first call.

        Raises ValueError where the weights are not float32 on the CPU, BackendError without the native extension.
        """
        if not self._is_native():
            weight = self.folded.weight
            raise ValueError(f"expected an engine in float32 on the CPU, got {weight.dtype} on {weight.device}")
        _check_extension()
        with _lock:
            if self._native is None:
                self._native = Network(self.folded.layers(), self.folded.outputs)
        return self._native

    def graphs(self) -> GraphCache:
        with _lock:
            if self._graphs is None:
                self._graphs = GraphCache(self.folded)
        return self._graphs

    def _forget(self) -> None:
        self._native = None
        self._graphs = None

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEfficientNet":
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_native": None, "_graphs": None}

    def __prepare_scriptable__(self) -> "FrozenEfficientNet":
        """What ``torch.jit.script`` calls first; raises TypeError."""
        raise TypeError(
            "expected a model for torch.jit.script, got a frozen engine; script the model that was frozen, or take "
            "torch.jit.trace(engine, images) or torch.export.export(engine, (images,))"
        )

    def train(self, mode: bool = True) -> "FrozenEfficientNet":
        """Nothing: a frozen network is always in eval mode."""
        return super().train(False)

    def profile(self, x: Tensor, repeat: int = 20) -> Profile:
        """What each step takes on the CPU for images ``x``: the median of ``repeat`` calls after a few others."""
        for _ in range(3):
            self.native().run(x)
        calls = [self.native().profile(x) for _ in range(repeat)]
        steps = [_median(list(step)) for step in zip(*calls, strict=True)]
        total = sum(step.seconds for step in steps)
        peak = cpu.fma_peak()
        rows = Profile()
        for name, multiply_adds, seconds in steps:
            rate = 2 * multiply_adds / seconds
            rows.append(ProfileRow(name, 1e3 * seconds, 1e-9 * rate, rate / peak, seconds / total))
        return rows


def _median(steps: Sequence[StepProfile]) -> StepProfile:
    return sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]


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
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
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
