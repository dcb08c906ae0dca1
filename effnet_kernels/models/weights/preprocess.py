"""From a photograph to a network's input."""

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Longer images than this many times their shorter side lose their ends before they are resized, not after.
_LONGEST = 16


class Pixels(int):
    """A number of pixels that may also be read as torchvision has it, as a list of one."""

    @classmethod
    def of(cls, name: str, value: Any) -> "Pixels":
        """A number, or a list of one; raises TypeError for anything else, ValueError below 1."""
        [number] = value if isinstance(value, list | tuple) and len(value) == 1 else [value]
        try:
            pixels = operator.index(number)
        except TypeError:
            raise TypeError(f"{name}: expected a number of pixels, got {value!r}") from None
        if pixels < 1:
            raise ValueError(f"{name}: expected at least one pixel, got {value!r}")
        return cls(pixels)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return [int(self)][index]


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize, crop the centre, scale to [0, 1], normalise: ``torchvision.transforms``' preset, to the last bit.

    Of an image more than 16 times as long as wide, whose resized form could be of any size, only the middle is resized.

    Attributes:
        crop_size: rows and columns of the result; smaller images get a black border.
        resize_size: the shorter side before the crop. Both are numbers and may be read, and given, as lists of one.
        interpolation: of the resize, with antialiasing.
        mean, std: per channel, of values in [0, 1].
        squash: whether both sides are resized to ``resize_size``, which loses nothing of an image but its aspect ratio.
    """

    crop_size: int
    resize_size: int
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    squash: bool = False

    def __post_init__(self) -> None:
        for name in ("crop_size", "resize_size"):
            object.__setattr__(self, name, Pixels.of(name, getattr(self, name)))

    def __call__(self, image: Any) -> Tensor:
        """The network's input.

        Args:
            image: a PIL image (converted to RGB), a uint8 array [H, W, 3], or a tensor [..., 3, H, W], uint8 or
                floating with values in [0, 1]. PIL resizes a PIL image; torch's resize of a tensor differs in rounding.

        Returns float32 [3, crop_size, crop_size], or [..., 3, crop_size, crop_size] for a tensor with batch dimensions.

        Raises TypeError for another type or dtype, ValueError for another shape.
        """
        if isinstance(image, Tensor):
            pixels = self._resize_tensor(_checked(image))
        elif hasattr(image, "convert") and hasattr(image, "resize"):
            pixels = self._resize_pil(image)
        elif hasattr(image, "__array_interface__"):
            array = torch.as_tensor(image)
            if array.dtype != torch.uint8 or array.dim() != 3 or array.shape[2] != 3:
                raise ValueError(f"expected a uint8 array [H, W, 3], got {array.dtype} {list(array.shape)}")
            pixels = self._resize_tensor(_checked(array.permute(2, 0, 1)))
        else:
            raise TypeError(f"expected a PIL image, a uint8 array or a tensor, got {type(image).__name__}")
        pixels = _center_crop(pixels, self.crop_size)
        pixels = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels.to(torch.float32)
        mean, std = pixels.new_tensor(self.mean), pixels.new_tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def _resize_pil(self, image: Any) -> Tensor:
        from PIL import Image

        top, left, height, width = self._middle(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.crop((left, top, left + width, top + height))
        image = image if image.mode == "RGB" else image.convert("RGB")
        height, width = self._resized(height, width)
        modes = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), modes[self.interpolation])
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, 3).permute(2, 0, 1)

    def _resize_tensor(self, image: Tensor) -> Tensor:
        top, left, height, width = self._middle(*image.shape[-2:])
        image = image[..., top : top + height, left : left + width]
        size = self._resized(height, width)
        if size == tuple(image.shape[-2:]):
            return image
        exact = image if image.dtype in (torch.float32, torch.float64) else image.to(torch.float32)
        batch = exact.reshape(-1, *exact.shape[-3:])
        resized = F.interpolate(batch, size, mode=self.interpolation, align_corners=False, antialias=True)
        if image.dtype == torch.uint8:
            # Bicubic interpolation overshoots the range of the pixels.
            resized = resized.clamp(0, 255).round()
        return resized.reshape(*exact.shape[:-2], *size).to(image.dtype)

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The top, left, height and width of what is resized: all but the ends of very long images."""
        if min(height, width) == 0:
            raise ValueError(f"expected an image with pixels, got {height}x{width}")
        if self.squash:
            return 0, 0, height, width
        # At least twice as much as the crop shows, so that the resize's filter does not see the ends.
        longest = min(height, width) * max(_LONGEST, 2 * math.ceil(self.crop_size / max(self.resize_size, 1)))
        # As many on both sides, so that no pixel moves by half of one.
        rows, columns = (min(side, longest + (side - longest) % 2) for side in (height, width))
        return (height - rows) // 2, (width - columns) // 2, rows, columns

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.resize_size, self.resize_size
        longer = int(self.resize_size * max(height, width) / min(height, width))
        return (longer, self.resize_size) if width <= height else (self.resize_size, longer)


def _checked(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"expected a uint8 or floating tensor, got {image.dtype}")
    if image.dim() < 3 or image.shape[-3] != 3:
        raise ValueError(f"expected a tensor [..., 3, H, W], got {list(image.shape)}")
    return image


def _center_crop(image: Tensor, size: int) -> Tensor:
    """The middle ``size`` rows and columns, of the image with a border of zeros where it is smaller."""
    height, width = image.shape[-2:]
    rows, columns = max(size - height, 0), max(size - width, 0)
    if rows or columns:
        image = F.pad(image, [columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2])
    top = round((image.shape[-2] - size) / 2)
    left = round((image.shape[-1] - size) / 2)
    return image[..., top : top + size, left : left + size]
