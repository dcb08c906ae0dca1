"""Photographs of every kind, folders of them, and what is said of them."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effnet_kernels.models.weights.photos import load_photo
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.tools.predict import Photo, demo_photos, find_photos, predict, progress_bar

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
ExifOrientation = 0x0112


def pixels(height: int = 24, width: int = 36) -> np.ndarray:
    """A smooth picture without any symmetry, in which a lossy codec changes little."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return (255 * np.stack([x, y, x * y], axis=2)).astype(np.uint8)


def mean_colour(image: Any) -> list[float]:
    return np.asarray(image).reshape(-1, 3).mean(0).tolist()


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".png", {}, 0),
        (".bmp", {}, 0),
        (".tiff", {}, 0),
        (".webp", {"lossless": True}, 0),
        # Of 255; these formats keep the pixels roughly.
        (".jpg", {"quality": 95, "subsampling": 0}, 6),
        (".webp", {"quality": 95}, 12),
    ],
)
def test_file_formats(tmp_path: Path, suffix: str, options: dict[str, Any], tolerance: int) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels()).save(path, **options)
    image = load_photo(path)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - pixels()).max() <= tolerance


# How the stored picture has to be turned for each EXIF orientation, by the Exif standard's definition of the tag.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exif_rotation_is_honoured(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[ExifOrientation] = orientation
    Image.fromarray(pixels()).save(path, exif=exif, quality=95)
    expected = ORIENTATIONS[orientation](pixels()).astype(int)
    got = np.asarray(load_photo(path)).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 4


def test_modes(tmp_path: Path) -> None:
    rgb = Image.fromarray(pixels())
    grey = np.asarray(rgb.convert("L"))

    def loaded(image: Any, name: str = "a.png", **options: Any) -> np.ndarray:
        image.save(tmp_path / name, **options)
        result = load_photo(tmp_path / name)
        assert result.mode == "RGB"
        return np.asarray(result)

    assert (loaded(rgb.convert("L")) == grey[:, :, None]).all()
    assert (loaded(rgb.convert("1")) == np.asarray(rgb.convert("1").convert("RGB"))).all()
    palette = rgb.quantize(16)
    assert (loaded(palette) == np.asarray(palette.convert("RGB"))).all()
    # Of 255; JPEG keeps the pixels roughly.
    assert mean_colour(Image.fromarray(loaded(rgb.convert("CMYK"), "a.jpg", quality=95))) == pytest.approx(
        mean_colour(rgb), abs=3
    )
    # 16-bit grey keeps its range.
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for name in ("a.png", "a.tiff"):
        assert np.abs(loaded(deep, name).astype(int) - grey[:, :, None]).max() <= 1


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    alpha = np.full((24, 36), 255, np.uint8)
    alpha[:12] = 0
    expected = pixels()
    expected[:12] = 255
    rgba = Image.fromarray(np.dstack([pixels(), alpha]))
    for name in ("a.png", "a.webp"):
        rgba.save(tmp_path / name, lossless=True)
        assert (np.asarray(load_photo(tmp_path / name)) == expected).all()
    two = Image.new("P", (4, 4), 1)
    two.putpalette([0, 0, 0, 9, 99, 200])
    two.save(tmp_path / "p.png", transparency=1)
    assert (np.asarray(load_photo(tmp_path / "p.png")) == 255).all()
    two.save(tmp_path / "q.png", transparency=0)
    assert (np.asarray(load_photo(tmp_path / "q.png")) == [9, 99, 200]).all()


def test_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert mean_colour(load_photo(tmp_path / "a.webp")) == [255, 0, 0]


def broken_files(folder: Path) -> list[Path]:
    """Files that are empty, of text, and cut off."""
    good = folder / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(good)
    Image.open(good).save(folder / "good.jpg")
    paths = [folder / name for name in ("empty.jpg", "text.jpg", "cut.png", "cut.jpg")]
    paths[0].touch()
    paths[1].write_text("not a photograph")
    paths[2].write_bytes(good.read_bytes()[:-3000])
    paths[3].write_bytes((folder / "good.jpg").read_bytes()[:-500])
    return paths


def test_broken_files_are_named(tmp_path: Path) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            load_photo(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: there is no such file"):
        load_photo(tmp_path / "none.jpg")


def test_find_photos(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "z/y/x.webp", "z/a.jpeg", "notes.txt", "z/._a.jpeg", "weights.pth", "noext"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    found = [photo.name for photo in find_photos([tmp_path])]
    assert found == [str(tmp_path / name) for name in ("a.png", "b.JPG", "z/a.jpeg", "z/y/x.webp")]
    # What is named is tried, whatever its suffix, and in the order of the names.
    named = [tmp_path / "noext", tmp_path / "z", tmp_path / "a.png", tmp_path / "missing.jpg"]
    found = [photo.name for photo in find_photos(named)]
    assert found == [str(path) for path in (named[0], tmp_path / "z/a.jpeg", tmp_path / "z/y/x.webp", *named[2:])]
    assert list(find_photos([])) == []


class Brightness(nn.Module):
    """Two logits of which the first is larger for dark images; counts the batches that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(x.shape[0])
        bright = x.mean((1, 2, 3))
        return torch.stack([-bright, bright, torch.full_like(bright, -100)], 1)


def grey_photo(name: str, value: int) -> Photo:
    return Photo(name, lambda: Image.new("RGB", (20, 30), (value,) * 3))


def test_predictions_keep_their_photographs(tmp_path: Path) -> None:
    def fail() -> Any:
        raise ValueError("of no use")

    values = [255, 0, 255, 255, 0, 0, 255]
    photos = [grey_photo(f"photo {i}", value) for i, value in enumerate(values)]
    photos.insert(2, Photo("broken", fail))
    preprocess = ImagePreprocess(8, 8)
    model = Brightness().train()
    results = list(predict(model, photos, preprocess, ["dark", "bright", "neither"], topk=2, batch_size=3))
    assert model.batches == [2, 3, 2]
    assert [result.photo for result in results] == [photo.name for photo in photos]
    assert results[2].error == "broken: of no use"
    assert results[2].guesses == []
    for value, result in zip(values, results[:2] + results[3:], strict=True):
        assert result.error is None
        assert [guess.name for guess in result.guesses] == (["bright", "dark"] if value else ["dark", "bright"])
        assert [guess.index for guess in result.guesses] == ([1, 0] if value else [0, 1])
        mean = float(preprocess(Image.new("RGB", (20, 30), (value,) * 3)).mean())
        expected = torch.tensor([-mean, mean, -100.0]).softmax(0).sort(descending=True).values[:2]
        assert [guess.probability for guess in result.guesses] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_batch_of_broken_files(tmp_path: Path) -> None:
    photos = list(find_photos(broken_files(tmp_path)))
    results = list(predict(Brightness(), photos, ImagePreprocess(8, 8), topk=1, batch_size=2))
    assert [result.photo for result in results] == [photo.name for photo in photos]
    assert all(result.error is not None and result.error.startswith(result.photo) for result in results)


def test_predict_without_names_and_without_photos() -> None:
    (result,) = predict(Brightness(), [grey_photo("a", 0)], ImagePreprocess(8, 8), topk=3)
    assert [guess.name for guess in result.guesses] == ["class 0", "class 1", "class 2"]
    assert list(predict(Brightness(), [], ImagePreprocess(8, 8))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 4}, "topk: expected at most 3, the number of classes, got 4"),
        ({"topk": 0}, "topk: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"class_names": ["a"], "topk": 1}, "class_names: expected 3, one for each output of the model, got 1"),
    ],
)
def test_predict_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(predict(Brightness(), [grey_photo("a", 0)], ImagePreprocess(8, 8), **arguments))


def test_progress_bar_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(progress_bar(iter([1, 2, 3]), 3)) == [1, 2, 3]  # type: ignore[list-item]
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress_bar(iter([1, 2, 3]), 3)) == [1, 2, 3]  # type: ignore[list-item]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err


def test_demo_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="the extra demo is not installed")
    photos = demo_photos()
    assert [photo.name for photo in photos] == ["chelsea", "rocket", "coffee"]
    assert [photo.open().size for photo in photos] == [(451, 300), (640, 427), (600, 400)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "effnet-kernels\[demo\]"'):
        demo_photos()


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "effnet-kernels\[images\]"'):
        load_photo(tmp_path / "a.jpg")


def test_photos_are_read_one_batch_ahead() -> None:
    taken = []

    def photos() -> Iterator[Photo]:
        for number in range(20):
            taken.append(number)
            yield grey_photo(str(number), number)

    seen = 0
    for result in predict(Brightness(), photos(), ImagePreprocess(8, 8), topk=1, batch_size=3):
        assert result.photo == str(seen)
        seen += 1
        # The batch of this one, and the next.
        assert len(taken) <= min(20, (seen + 2) // 3 * 3 + 3)
    assert seen == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_who_asks_for_no_more_does_not_wait(workers: int, tmp_path: Path) -> None:
    for number in range(8):
        Image.fromarray(pixels()).save(tmp_path / f"{number}.png")
    results = predict(
        Brightness(), find_photos([tmp_path]), ImagePreprocess(8, 8), topk=1, batch_size=2, workers=workers
    )
    assert next(results).photo.endswith("0.png")
    results.close()


def test_processes_read_what_threads_do(tmp_path: Path) -> None:
    for number in range(5):
        Image.fromarray(pixels(20 + number)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"not an image")
    photos = list(find_photos([tmp_path]))
    threads, processes = (
        list(predict(Brightness(), photos, ImagePreprocess(8, 8), topk=2, batch_size=2, workers=workers))
        for workers in (0, 2)
    )
    assert processes == threads
    assert [result.error is None for result in processes] == [True, True, True, False, True]


def test_a_reading_process_that_is_ended_is_an_error(tmp_path: Path) -> None:
    photo = Photo("a", partial(os._exit, 1))
    with pytest.raises(OSError, match="a process that read photographs was ended"):
        list(predict(Brightness(), [photo], ImagePreprocess(8, 8), topk=1, workers=1))
