"""Squeeze-and-excitation."""

from collections.abc import Callable

from torch import Tensor, nn

from effnet_kernels.modules.chain import ExcitationLayers, squeeze_layer_obstacle
from effnet_kernels.modules.operator_module import ACTIVATION_NAMES, GATE_NAMES, children_obstacle


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that is computed from all channels' means (Hu et al. 2018, equations 2 to 4).

    Args:
        input_channels: channels of the input and the output.
        squeeze_channels: channels between the two fully connected layers.
        activation: builds the activation between them.
        scale_activation: builds the activation of the gate.

    Shapes: [N, C, H, W] to the same.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, input: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(input)))))
        return scale * input

    def layers(self) -> ExcitationLayers:
        """The module as a part of a chain."""
        return ExcitationLayers(
            self.fc1, self.fc2, ACTIVATION_NAMES[type(self.activation)], GATE_NAMES[type(self.scale_activation)]
        )

    def find_obstacle(self) -> str | None:
        """Why the operators cannot stand for :meth:`forward`, or None."""
        children = self._modules
        obstacle = children_obstacle((name, children.get(name), expected) for name, expected in _CHILDREN.items())
        return obstacle or squeeze_layer_obstacle("fc1", self.fc1) or squeeze_layer_obstacle("fc2", self.fc2)


_CHILDREN: dict[str, tuple[type[nn.Module], ...]] = {
    "avgpool": (nn.AdaptiveAvgPool2d,),
    "fc1": (nn.Conv2d,),
    "fc2": (nn.Conv2d,),
    "activation": tuple(ACTIVATION_NAMES),
    "scale_activation": tuple(GATE_NAMES),
}
