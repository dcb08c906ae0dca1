"""freeze(): a trained network as an engine for inference."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import cpu
from effnet_kernels.cpu.network import Excitation, Layer, Network, StepProfile
from effnet_kernels.dispatch import BackendError
from effnet_kernels.models.features import FeatureInfo
from effnet_kernels.modules.chain import ConvNorm, ExcitationLayers, Parts
from effnet_kernels.modules.operator_module import memory_format
from effnet_kernels.peer_networks import read_network


def freeze(model: nn.Module, features: bool = False) -> "FrozenEfficientNet":
    """The network as an engine for inference on the CPU: one native call, BatchNorm folded, weights packed.

    The engine has the model's weights of this moment; the model is left as it is. Whether it is in train or eval mode
    does not matter: the engine computes what it computes in eval mode. Dropout and stochastic depth are gone.

    Args:
        model: an EfficientNet on the CPU, in float32: this package's, torchvision's, timm's or
            ``efficientnet_pytorch``'s, and torchvision's MobileNets and timm's other networks of the same class;
            accelerated or not. A classifier that is not a linear layer stays a module.
        features: whether the engine returns feature maps, as a backbone does: the last map of each resolution, the
            finest first, without the head. Models that return maps themselves keep to their own choice.

    Returns a module of images [N, C, H, W], float32, of any batch size, resolution and strides, to what the model
    returns. It has no parameters and no gradients, is pickled with its weights, and may be called by several threads.

    Raises:
        TypeError: for another model.
        ValueError: for a part that the engine does not know, or weights that are not float32 on the CPU.
        BackendError: where the native extension is missing.
    """
    network = read_network(model)
    reason = cpu.unavailable_reason()
    if reason is not None:
        raise BackendError(f"freeze() needs the native extension: {reason}")
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(f"{name}: expected float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    layers: list[Layer] = []
    ends, strides = [], []
    for stage in ([network.stem], *network.stages):
        before = len(layers)
        for name, parts in stage:
            _append(layers, name, parts)
        ends.append(len(layers))
        strides.append(math.prod(layer.stride for layer in layers[before:]))
    maps = network.maps
    if maps is None and features:
        maps = FeatureInfo.of_layers([layers[end - 1].weight.shape[0] for end in ends], strides, None).layers()
    if maps is not None:
        chosen = [ends[i] for i in maps]
        return FrozenEfficientNet(Network(layers[: max(chosen)], chosen), None, True)
    assert network.head is not None
    _append(layers, *network.head)
    if layers[-1].weight.shape[-1] != 1:
        raise ValueError(
            f"{network.head[0]}: expected a 1x1 convolution as head, got {network.head[1].layers[-1].conv}"
        )
    layers[-1] = layers[-1]._replace(pool=True)
    classifier = network.classifier
    if type(classifier) is nn.Linear:
        bias = torch.zeros(classifier.out_features) if classifier.bias is None else classifier.bias
        layers.append(Layer(classifier.weight[:, :, None, None], bias))
    left = None if type(classifier) in (nn.Linear, nn.Identity) else copy.deepcopy(classifier)
    return FrozenEfficientNet(Network(layers, [len(layers)]), left)


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
        network: the layers.
        classifier: what torch computes of the pooled features, or None.
        features_only: whether the outputs are maps.

    Shapes: images [N, C, H, W], float32, in any strides, to logits [N, num_classes], pooled features [N, num_features]
    or a list of feature maps in the image's memory format.
    Raises ValueError for other images, RuntimeError for images that require gradients.
    """

    def __init__(self, network: Network, classifier: nn.Module | None, features_only: bool = False) -> None:
        super().__init__()
        self.network = network
        self.classifier = None if classifier is None else classifier.eval()
        self.features_only = features_only

    def forward(self, x: Tensor) -> Any:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("expected an image without gradients: a frozen network only infers")
        if self.features_only:
            return self.network.run(x, memory_format(x))
        y = self.network.run(x)[0].flatten(1)
        return y if self.classifier is None else self.classifier(y)

    def train(self, mode: bool = True) -> "FrozenEfficientNet":
        """Nothing: a frozen network is always in eval mode."""
        return super().train(False)

    def profile(self, x: Tensor, repeat: int = 20) -> Profile:
        """What each step takes for images ``x``, the median of ``repeat`` calls after a few that are not counted."""
        for _ in range(3):
            self.network.run(x)
        calls = [self.network.profile(x) for _ in range(repeat)]
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


def _append(layers: list[Layer], name: str, parts: Parts) -> None:
    """Appends the layers of a block."""
    before = len(layers)
    for index, part in enumerate(parts.layers):
        layer = _layer(name, part)
        if parts.excitation is not None and index == len(parts.layers) - 2:
            layer = layer._replace(excitation=_excitation(parts.excitation))
        layers.append(layer)
    if parts.residual:
        layers[-1] = layers[-1]._replace(residual=before)


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
    biases = [torch.zeros(fc.out_channels) if fc.bias is None else fc.bias for fc in (fc1, fc2)]
    return Excitation(fc1.weight.flatten(1), biases[0], fc2.weight.flatten(1), biases[1], act, gate)
