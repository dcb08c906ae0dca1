"""The layers of a network whose BatchNorms are folded into its convolutions."""

from typing import Literal, NamedTuple

from torch import Tensor

from effnet_kernels.deferred import Activation, Gate, Padding


class Excitation(NamedTuple):
    """Squeeze-and-excitation after a depthwise layer: ``gate(w2 @ act(w1 @ mean + b1) + b2)``."""

    w1: Tensor  # [S, C]
    b1: Tensor  # [S]
    w2: Tensor  # [C, S]
    b2: Tensor  # [C]
    act: Activation
    gate: Gate = "sigmoid"


class Layer(NamedTuple):
    """A convolution with BatchNorm folded into it. Layer i reads tensor i (0 is the image) and makes tensor i + 1.

    Attributes:
        weight: [K, C, k, k], a depthwise one [K, 1, k, k]. A fully connected layer is a 1x1 convolution of one pixel.
        bias: [K].
        depthwise: whether every channel is convolved by itself.
        stride: of both dimensions.
        padding: zeros on the (left, right, top, bottom), or "same" for TensorFlow's.
        act: the activation.
        residual: the tensor added after the activation, or -1.
        pool: whether the output is its own spatial mean; of 1x1 convolutions.
        excitation: what follows a depthwise layer, or None.
    """

    weight: Tensor
    bias: Tensor
    depthwise: bool = False
    stride: int = 1
    padding: Padding | Literal["same"] = (0, 0, 0, 0)
    act: Activation = "none"
    residual: int = -1
    pool: bool = False
    excitation: Excitation | None = None

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias, *(self.excitation or ())[:4]]
