"""Squeeze-and-excitation."""

from collections.abc import Callable

from torch import Tensor, nn

from effnet_kernels.fusion.inspection import ACTIVATIONS_OF, GATES_OF, checked
from effnet_kernels.fusion.lowering import lower_excitation
from effnet_kernels.fusion.spec import Excitation


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

    def excitation(self, prefix: str = "") -> Excitation:
        """The module as a part of a chain; its children's names in errors begin with ``prefix``.

        Raises Unsupported where no kernel computes it.
        """
        children = self._modules
        checked(f"{prefix}avgpool", children.get("avgpool"), (nn.AdaptiveAvgPool2d,))
        fc1 = checked(f"{prefix}fc1", children.get("fc1"), (nn.Conv2d,))
        fc2 = checked(f"{prefix}fc2", children.get("fc2"), (nn.Conv2d,))
        act = checked(f"{prefix}activation", children.get("activation"), tuple(ACTIVATIONS_OF))
        gate = checked(f"{prefix}scale_activation", children.get("scale_activation"), tuple(GATES_OF))
        names = f"{prefix}fc1", f"{prefix}fc2"
        return lower_excitation(names, fc1, fc2, ACTIVATIONS_OF[type(act)], GATES_OF[type(gate)])
