"""Photographs that nobody would take on purpose: what they may cost, and what they may do to the others."""

import errno
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effnet_kernels.models.weights.photos import load_photo
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.tools.predict import Photo, predict

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

PRESETS = {
    "b0": ImagePreprocess(224, 256, "bicubic"),
    "b7": ImagePreprocess(600, 600, "bicubic"),
    "a border": ImagePreprocess(261, 122),
    "mostly border": ImagePreprocess(200, 3),
    "small": ImagePreprocess(7, 8),
}


def smooth(height: int, width: int) -> np.ndarray:
    """A picture whose every part differs from the others, slowly."""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    waves = [np.sin(x / 9) + np.cos(y / 7), np.cos(x / 23) * np.sin(y / 5 + 1), np.sin((x + y) / 31)]
    return np.clip(127 + 60 * np.stack([wave + 0 * x + 0 * y for wave in waves], 2), 0, 255).astype(np.uint8)


def whole(preprocess: ImagePreprocess, image: Any) -> Tensor:
    """The preprocessing without bounds: the whole image is resized, then cropped."""
    short, long = sorted(image.size)
    longer = int(preprocess.resize_size * long / short)
    size = (preprocess.resize_size, longer) if image.width <= image.height else (longer, preprocess.resize_size)
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[preprocess.interpolation]
    crop = ImagePreprocess(preprocess.crop_size, min(size))
    return crop(image.resize(size, mode) if size != image.size else image)


SIDES = (1, 2, 3, 5, 16, 17, 30, 100, 255)


@pytest.mark.parametrize("preset", PRESETS)
def test_ordinary_shapes_come_out_as_ever(preset: str) -> None:
    for height, width in itertools.product(SIDES, SIDES):
        if max(height, width) <= 16 * min(height, width):
            image = Image.fromarray(smooth(height, width))
            assert torch.equal(PRESETS[preset](image), whole(PRESETS[preset], image)), (height, width)


@pytest.mark.parametrize("preset", ["b0", "a border", "small"])
@pytest.mark.parametrize("parity", [0, 1])
def test_the_middle_of_a_long_image_is_what_it_was(preset: str, parity: int) -> None:
    for short, ratio in itertools.product((8, 9, 20), (17, 18.7, 40)):
        long = int(short * ratio) // 2 * 2 + parity
        for height, width in ((short, long), (long, short)):
            pixels = smooth(height, width)
            image = Image.fromarray(pixels)
            expected, tensor = whole(PRESETS[preset], image), torch.from_numpy(pixels).permute(2, 0, 1)
            # Up to half a pixel of the result where the length is no multiple of the width.
            for got in (PRESETS[preset](image), PRESETS[preset](tensor), PRESETS[preset](pixels)):
                assert got.shape == expected.shape
                assert (got - expected).abs().mean() < (0.2 if preset == "small" else 0.02), (height, width)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("long", [100, 9_999, 10_000, 60_000, 1_000_001])
def test_a_resize_makes_no_more_than_a_bound(preset: str, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess, made = PRESETS[preset], []
    resize, interpolate = Image.Image.resize, torch.nn.functional.interpolate
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, size, **rest: made.append(size) or interpolate(x, size, **rest)
    )
    for short in (1, 2, 7):
        for height, width in ((short, long), (long, short)):
            image = Image.new("RGB", (width, height), (255, 0, 0))
            for given in (image, image.convert("L"), torch.zeros(3, height, width, dtype=torch.uint8)):
                assert preprocess(given).shape == (3, preprocess.crop_size, preprocess.crop_size)
    factor = max(17, 2 * preprocess.crop_size / preprocess.resize_size + 3)
    assert made
    assert max(max(size) for size in made) <= factor * preprocess.resize_size


# One photograph among others


class Brightness(nn.Module):
    """Two logits; no numbers for images of one colour."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3))
        green = x[:, 1].mean((1, 2)) > x[:, 0].mean((1, 2)) + 1
        return torch.stack([bright, -bright], 1).where(~green[:, None], float("nan"))


def grey(name: str = "good") -> Photo:
    return Photo(name, lambda: Image.new("RGB", (20, 30), (99, 99, 99)))


ERRORS = [
    MemoryError(),
    OSError(errno.EIO, "no"),
    ValueError("bad"),
    SyntaxError("broken PNG"),
    RuntimeError("no room"),
]
ERRORS += [KeyError(3), IndexError(), TypeError("x"), OverflowError(), AttributeError("a"), NotImplementedError()]
ERRORS += [
    ZeroDivisionError(),
    EOFError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    RecursionError(),
    Warning("w"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["opening", "preparing"])
def test_an_error_is_one_photographs_own(error: Exception, place: str) -> None:
    def fail(*_: Any) -> Any:
        raise error

    class Marked:
        pass

    def prepare(image: Any) -> Tensor:
        return fail() if isinstance(image, Marked) else ImagePreprocess(8, 8)(image)

    bad = Photo("bad one", fail if place == "opening" else Marked)
    for batch_size, where in itertools.product((1, 2, 16), range(3)):
        photos = [grey("a"), grey("b")]
        photos.insert(where, bad)
        results = list(predict(Brightness(), photos, prepare, topk=1, batch_size=batch_size))
        assert [result.photo for result in results] == [photo.name for photo in photos]
        assert [result.error is not None for result in results] == [photo is bad for photo in photos]
        assert all(len(result.guesses) == (result.error is None) for result in results)
        said = results[where].error
        assert said is not None
        assert said.startswith("bad one: ")
        assert len(said) > len("bad one: ")


def test_outputs_that_are_no_numbers_are_one_photographs_own() -> None:
    green = Photo("green", lambda: Image.new("RGB", (20, 30), (0, 255, 0)))
    results = list(predict(Brightness(), [grey("a"), green, grey("b")], ImagePreprocess(8, 8), topk=2))
    assert [len(result.guesses) for result in results] == [2, 0, 2]
    assert results[1].error == "green: the network's output for it is no number"


NOT_PHOTOS: dict[str, bytes] = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "html": b"<!DOCTYPE html><html></html>",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "psd": b"8BPS\x00\x01" + bytes(40),
    "fits": b"SIMPLE  =                    T" + bytes(80),
    "ico": b"\x00\x00\x01\x00\x01\x00" + bytes(40),
    "icns": b"icns" + bytes(40),
    "empty": b"",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".eps", ""])
@pytest.mark.parametrize("kind", NOT_PHOTOS)
def test_other_formats_are_not_opened(tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **_: Any) -> Any:
        raise SystemExit(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen.__init__", start)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(NOT_PHOTOS[kind])
    with pytest.raises(ValueError, match="not an image of one of the formats JPEG, PNG"):
        load_photo(path)


def test_photographs_of_several_pictures_are_opened(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert load_photo(tmp_path / "a.jpg").size == (8, 8)
