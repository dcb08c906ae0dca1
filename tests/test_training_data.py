"""The images of training: every source, random changes that can be repeated, broken images."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import datasets
from training_cases import photograph, save_shards

from effnet_kernels.train.config import Config
from effnet_kernels.train.data import Batch, EpochSampler, ImageData, Sample, collate, training_transform
from effnet_kernels.train.images import load_images
from effnet_kernels.train.recipes import resolve

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six photographs."""
    for number in range(12):
        path = tmp_path / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        photograph(number).save(path)
    return tmp_path


def configuration(name: Any, **data: Any) -> Config:
    data = {"name": str(name), "image_size": 16, "batch_size": 4, "workers": 0, **data}
    return resolve({"data": data, "augmentation": {"mixup": 0.0, "cutmix": 0.0}}, "modern")


def epoch_of(data: ImageData, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def test_digits_are_split_by_class() -> None:
    training, validation = load_images(configuration("digits").data)
    assert len(training.labels) + len(validation.labels) == 1797
    assert set(training.names).isdisjoint(validation.names)
    assert list(training.classes) == [str(digit) for digit in range(10)]
    shares = np.bincount(validation.labels) / np.bincount([*training.labels, *validation.labels])
    assert shares == pytest.approx(np.full(10, 0.2), abs=0.01)
    from sklearn.datasets import load_digits

    digits = load_digits()
    for images in (training, validation):
        number = int(images.names[5].split()[1])
        assert images.labels[5] == digits.target[number]
        pixels = np.asarray(images.load(5))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[..., 1] - digits.images[number] * 255 / 16).max() <= 0.5


def cifar_archive(root: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> dict[str, np.ndarray]:
    """An archive of the published layout with a few images, whose checksums torchvision is told."""
    import hashlib

    pixels, files = {}, {}
    fine = kind is datasets.CIFAR100
    for entry, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        values = np.random.default_rng(entry).integers(0, 256, (8, 3072), dtype=np.uint8)
        labels = [(entry + number) % (100 if fine else 10) for number in range(8)]
        files[name] = pickle.dumps({"data": values, "fine_labels" if fine else "labels": labels})
        pixels[name] = values.reshape(8, 3, 32, 32).transpose(0, 2, 3, 1)
    names = [f"class {number}" for number in range(100 if fine else 10)]
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: names})
    path = root / kind.filename
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return pixels


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_an_archive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    pixels = cifar_archive(tmp_path, monkeypatch, kind)
    training, validation = load_images(configuration(name, dir=str(tmp_path)).data)
    assert len(training.labels) == 8 * len(kind.train_list)
    assert np.array_equal(np.asarray(training.load(3)), pixels[kind.train_list[0][0]][3])
    assert np.array_equal(np.asarray(validation.load(7)), pixels[kind.test_list[0][0]][7])
    assert training.labels[3] == 3
    assert training.classes[3] == "class 3"


def test_cifar_without_an_archive_or_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    (tmp_path / datasets.CIFAR10.filename).write_bytes(b"cut")
    with pytest.raises(OSError, match=r"cifar10: expected cifar-10-python.tar.gz in .*, or a network .* no network"):
        load_images(configuration("cifar10", dir=str(tmp_path)).data)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_images(configuration("cifar10", dir=str(tmp_path / "missing")).data)


def test_folders_of_classes(folder: Path) -> None:
    training, validation = load_images(configuration(folder, held_out=1 / 3).data)
    assert (len(training.labels), len(validation.labels)) == (8, 4)
    assert sorted(validation.labels) == [0, 0, 1, 1]
    for images in (training, validation):
        for number, name in enumerate(images.names):
            assert Path(name).parent.name == images.classes[images.labels[number]]
            assert images.load(number).getpixel((3, 4)) == photograph(int(Path(name).stem)).getpixel((3, 4))


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_folders_for_training_and_validation(validation: str, folder: Path, tmp_path: Path) -> None:
    for part in ("train", validation):
        for name in ("cat", "dog"):
            path = tmp_path / "parts" / part / name / f"{part}.png"
            path.parent.mkdir(parents=True)
            photograph(0).save(path)
    training, held_out = load_images(configuration(tmp_path / "parts").data)
    assert {Path(name).stem for name in training.names} == {"train"}
    assert {Path(name).stem for name in held_out.names} == {validation}
    (tmp_path / "parts" / validation / "dog").rename(tmp_path / "parts" / validation / "wolf")
    with pytest.raises(ValueError, match=r"same classes .* got \['dog', 'wolf'\]"):
        load_images(configuration(tmp_path / "parts").data)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; names of data sets are digits"):
        load_images(configuration(tmp_path / "digitz").data)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder val, validation or test beside train"):
        load_images(configuration(tmp_path).data)
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="class"):
        load_images(configuration(tmp_path).data)


def test_fewer_images_than_a_batch(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_size: expected at most the 9 images"):
        ImageData(configuration(folder, batch_size=10))


def test_an_epoch_has_every_image_once_in_another_order(folder: Path) -> None:
    data = ImageData(configuration(folder, batch_size=3))
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    names = [[name for batch in epoch for name in batch.names] for epoch in (first, second)]
    assert sorted(names[0]) == sorted(names[1]) == sorted(data.images[0].names if data.images else [])
    assert names[0] != names[1]
    for batch in first:
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert [("cat", "dog")[label] for label in batch.labels] == [Path(name).parent.name for name in batch.names]


def test_draws_do_not_depend_on_workers_or_on_what_came_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nor are GPUs seeded anew, which torch.manual_seed would do.
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
    batches = {}
    for workers in (0, 1, 2):
        torch.default_generator.manual_seed(workers)
        state = torch.get_rng_state()
        batches[workers] = epoch_of(ImageData(configuration(folder, batch_size=3, workers=workers)), 2)
        # Nor do they disturb those of the network.
        assert torch.equal(state, torch.get_rng_state())
    for workers in (1, 2):
        for expected, batch in zip(batches[0], batches[workers], strict=True):
            assert torch.equal(batch.images, expected.images)
            assert batch.names == expected.names
    # Others in another epoch, and with another seed.
    sample = {name: image for batch in batches[0] for name, image in zip(batch.names, batch.images, strict=True)}
    for seed, epoch in ((0, 3), (1, 2)):
        other = configuration(folder, batch_size=3).override({"training": {"seed": seed}})
        for batch in epoch_of(ImageData(other), epoch):
            for name, image in zip(batch.names, batch.images, strict=True):
                assert not torch.equal(image, sample[name])


def test_validation_is_in_order_and_as_the_network_is_used(folder: Path) -> None:
    data = ImageData(configuration(folder, resize=20))
    [batch] = list(data.val_dataloader())
    assert data.images is not None
    assert batch.names == data.images[1].names
    from effnet_kernels.models.weights.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocess

    expected = ImagePreprocess(16, 20, "bicubic", IMAGENET_MEAN, IMAGENET_STD)(data.images[1].load(1))
    assert torch.equal(batch.images[1], expected)


@pytest.mark.parametrize("policy", [None, "imagenet", "cifar", "randaugment", "trivial"])
@pytest.mark.parametrize("crop", ["resized", "shift"])
def test_changed_images_fit_the_network(policy: str | None, crop: str) -> None:
    values = {"policy": policy, "crop": crop, "erase": 0.5}
    config = configuration("digits").override({"augmentation": values, "data": {"image_size": 20}})
    for size in ((50, 24), (24, 50), (9, 9)):
        image = training_transform(config)(photograph(0).resize(size))
        assert type(image) is Tensor
        assert (image.shape, image.dtype) == ((3, 20, 20), torch.float32)
        assert image.isfinite().all()


def test_values_are_normalised() -> None:
    config = resolve({"data": {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}, "augmentation": {"crop": "resized"}})
    image = training_transform(config)(Image.new("RGB", (30, 30), (255, 51, 51)))
    assert image.mean((1, 2)).tolist() == pytest.approx([1.0, -0.2, 0.2])


def break_some(folder: Path, number: int) -> None:
    for path in sorted((folder / "dog").iterdir())[:number]:
        path.write_bytes(path.read_bytes()[:60])


def test_broken_images_are_named_and_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_some(folder, 2)
    data = ImageData(configuration(folder, batch_size=9, max_broken=2, held_out=0.25))
    for epoch in range(3):
        [batch] = epoch_of(data, epoch)
        assert len(batch.images) == len(batch.labels) == len(batch.names) == 9 - len(batch.broken)
        [validated] = [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]
        assert len(batch.broken) + len(validated.broken) == 2
    said = capsys.readouterr().err.splitlines()
    # Once each, though every epoch meets them.
    assert sorted(line.split(": ")[1].removeprefix("skipped ") for line in said) == sorted(
        str(path) for path in sorted((folder / "dog").iterdir())[:2]
    )


def test_too_many_broken_images_stop_training(folder: Path) -> None:
    break_some(folder, 3)
    data = ImageData(configuration(folder, batch_size=9, max_broken=2, held_out=0.25))
    with pytest.raises(ValueError, match=r"data.max_broken: expected at most 2 .*, got 3; --max-broken N"):
        for _ in (epoch_of(data), [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]):
            pass


def test_a_batch_of_broken_images() -> None:
    batch = collate([Sample(None, 1, "a: why"), Sample(None, 0, "b: why")])
    assert batch.broken == ["a: why", "b: why"]
    assert (len(batch.images), len(batch.labels), batch.names) == (0, 0, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards(workers: int, tmp_path: Path) -> None:
    described = {"validation": save_shards(tmp_path, 2, 100), "train_images": 12, "classes": ("cat", "dog")}
    data = ImageData(configuration(save_shards(tmp_path, 3), workers=workers, **described))
    assert (data.classes, data.batches) == (["cat", "dog"], 3)
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(8)]
    assert all(batch.images.shape == (4, 3, 16, 16) and not batch.broken for batch in batches)
    assert len({name for batch in batches for name in batch.names}) > 6
    for batch in batches:
        assert [int(name[-1]) % 2 for name in batch.names] == batch.labels.tolist()
    validated = [name for batch in data.val_dataloader() for name in batch.names]
    assert len(validated) == len(set(validated)) == 8


def test_broken_samples_of_save_shards(tmp_path: Path) -> None:
    def damage(entry: dict[str, bytes]) -> None:
        if entry["cls"] == b"1":
            entry["cls"] = b"7"

    pattern = save_shards(tmp_path, 2, 0, damage)
    described = {"validation": pattern, "train_images": 8, "classes": ("cat", "dog"), "max_broken": 9}
    data = ImageData(configuration(pattern, **described))
    batches = list(data.val_dataloader())
    assert sum(len(batch.images) for batch in batches) == 4
    for message in (message for batch in batches for message in batch.broken):
        assert "expected an image and a class from 0 to 1 in cls" in message


def test_shards_need_to_be_described() -> None:
    with pytest.raises(ValueError, match=r"shards need data.validation, data.train_images, data.classes"):
        ImageData(configuration("https://example.org/{0..9}.tar"))


def test_processes_share_what_one_would_take(folder: Path) -> None:
    config = configuration(folder, batch_size=2)
    for epoch in range(2):
        shares = []
        for rank in range(3):
            sampler = EpochSampler(14, 5, True, rank, 3)
            sampler.set_epoch(epoch)
            shares.append([number for _, number in sampler])
            assert len(shares[-1]) == len(sampler) == (5 if rank < 2 else 4)
        alone = EpochSampler(14, 5, shuffle=True)
        alone.set_epoch(epoch)
        # Batch after batch, and the last with what is left.
        joined = [share[index] for index in range(5) for share in shares if index < len(share)]
        assert joined == [number for _, number in alone]
    # A run of several processes is evaluated by one, which takes all images.
    data = ImageData(config.override({"training": {"devices": 2}}))
    assert data.batches == 9 // 4
    assert sum(len(batch.names) for batch in data.val_dataloader()) == 3


def test_the_order_is_the_seeds_and_the_epochs() -> None:
    def order(seed: int, epoch: int) -> list[Any]:
        sampler = EpochSampler(50, seed, shuffle=True)
        sampler.set_epoch(epoch)
        return [number for _, number in sampler]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(5, 7)) == list(range(50))
