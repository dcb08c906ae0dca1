"""Photographs: from a file to an RGB image of PIL."""

import os
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Pillow would try others too, of which some start programs, such as Ghostscript for an EPS with the suffix .jpg.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


def load_photo(path: str | os.PathLike[str]) -> "Image":
    """The photograph in a file, as :func:`read_photo` has it.

    Raises OSError or ValueError, naming the path, for a file that cannot be read; ModuleNotFoundError without Pillow.
    """
    pillow()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    return read_photo(path, os.fspath(path))


def read_photo(file: str | os.PathLike[str] | BinaryIO, name: str) -> "Image":
    """The photograph as it should be seen, as an RGB image of PIL: turned as its EXIF says, 8 bits a channel.

    Transparent parts become white. The first frame of several is taken. Formats are those of ``PHOTO_FORMATS``.

    Raises ValueError, which begins with ``name``, for what cannot be read; ModuleNotFoundError without Pillow.
    """
    image_module = pillow()
    from PIL import ImageOps

    image_module.init()
    formats = [form for form in PHOTO_FORMATS if form in image_module.OPEN]
    try:
        with image_module.open(file, formats=formats) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise errors of many types for damaged files.
    except Exception as error:
        if image_module.UnidentifiedImageError is type(error):
            raise ValueError(f"{name}: not an image of one of the formats {', '.join(formats)}") from error
        raise ValueError(f"{name}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What went wrong, also where the error brings no message."""
    return str(error) or ("there is not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


def to_rgb(image: "Image") -> "Image":
    """An image of any mode as RGB: 16-bit grey is scaled to 8 bits, transparent parts become white."""
    image_module = pillow()
    if image.mode.startswith("I"):
        # convert() would clip 16-bit values to 255 instead of scaling them.
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        return image_module.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def pillow() -> Any:
    """Pillow's module Image; raises ModuleNotFoundError, with the command that installs it, where it is missing."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading photographs needs Pillow: pip install "effnet-kernels[images]"', name="PIL"
        ) from error
    return Image
