"""From labelled images to batches: random changes, workers, broken images, shards."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import v2

from effnet_kernels.models.weights.photos import PHOTO_SUFFIXES, read_photo, reason_of
from effnet_kernels.models.weights.preprocess import ImagePreprocess
from effnet_kernels.tools.console import printable, say
from effnet_kernels.train.config import Config, Data
from effnet_kernels.train.images import Images, load_images


class Sample(NamedTuple):
    """An image [3, H, W], its class and its name; or no image, and why."""

    image: Tensor | None
    label: int
    name: str


class Batch(NamedTuple):
    """Images [N, 3, H, W], labels [N], their names, and what is said of those that could not be read."""

    images: Tensor
    labels: Tensor
    names: list[str]
    broken: list[str]


def collate(samples: list[Sample]) -> Batch:
    """The samples' images as one tensor, in channels-last strides."""
    read = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in samples if sample.image is not None]
    stacked = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.float32, device="cpu")
    return Batch(
        stacked.contiguous(memory_format=torch.channels_last),
        torch.tensor([sample.label for sample in read], dtype=torch.int64, device="cpu"),
        [sample.name for sample in read],
        [sample.name for sample in samples if sample.image is None],
    )


class SampleSet(Dataset[Sample]):
    """Images as samples, by epoch and number.

    What is drawn for a sample depends on the seed, the epoch and the number alone: not on the workers, and not on where
    in the epoch training began.
    """

    def __init__(self, images: Images, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, number = key
        name = self.images.names[number]
        with _seeded(self.seed, epoch, number):
            return make_sample(partial(self.images.load, number), self.transform, self.images.labels[number], name)


def make_sample(load: Callable[[], Any], transform: Callable[[Any], Tensor], label: int, name: str) -> Sample:
    """The sample of an image, or why there is none."""
    try:
        return Sample(transform(load()), label, name)
    # Decoders and allocators raise errors of many types.
    except Exception as error:
        reason = reason_of(error)
        return Sample(None, label, reason if name in reason else f"{name}: {reason}")


class EpochSampler(Sampler[tuple[int, int]]):
    """All numbers, with their epoch: in order, or in an order that depends on the seed and the epoch alone.

    Of n processes each takes every n-th number, so that together they take the batches that one would.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, rank: int = 0, processes: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Lightning calls it before each. Another epoch than before begins at its beginning."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def skip_to(self, epoch: int, start: int) -> None:
        """Begins in the middle of an epoch, after so many numbers."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.processes))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        numbers: Any = range(self.length)
        if self.shuffle:
            generator = torch.Generator("cpu").manual_seed(_seed_of(self.seed, self.epoch))
            numbers = torch.randperm(self.length, generator=generator, device="cpu").tolist()
        return ((self.epoch, number) for number in numbers[self.rank :: self.processes][self.start :])


@contextlib.contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seeds what is drawn inside, and nothing else."""
    # The CPU's generator alone: a GPU's draws dropout and stochastic depth meanwhile.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(*numbers))
        yield


def _seed_of(*numbers: int) -> int:
    # The hash of a tuple of integers is the same in every process.
    return hash(numbers) % 2**63


def training_transform(config: Config) -> Callable[[Any], Tensor]:
    """From a PIL image to the network's input, with the random changes of training."""
    data, augmentation = config.data, config.augmentation
    size = data.image_size or 0
    interpolation = v2.InterpolationMode(data.interpolation)
    steps: list[Any] = [v2.ToImage()]
    if augmentation.crop == "resized":
        steps += [v2.RandomResizedCrop(size, (augmentation.min_scale, 1.0), interpolation=interpolation)]
    else:
        steps += [v2.Resize(size, interpolation), v2.CenterCrop(size), v2.RandomCrop(size, padding=max(1, size // 8))]
    if augmentation.flip:
        steps += [v2.RandomHorizontalFlip()]
    if augmentation.policy == "randaugment":
        steps += [v2.RandAugment(magnitude=augmentation.magnitude)]
    elif augmentation.policy == "trivial":
        steps += [v2.TrivialAugmentWide()]
    elif augmentation.policy is not None:
        policies = {"imagenet": v2.AutoAugmentPolicy.IMAGENET, "cifar": v2.AutoAugmentPolicy.CIFAR10}
        steps += [v2.AutoAugment(policies[augmentation.policy])]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(data.mean or ()), list(data.std or ()))]
    if augmentation.erase > 0:
        steps += [v2.RandomErasing(augmentation.erase)]
    return v2.Compose([*steps, v2.ToPureTensor()])


def preprocess_of(data: Data) -> ImagePreprocess:
    """From a photograph to the network's input, as it is validated and used."""
    fields = (data.image_size, data.resize, data.interpolation, data.mean, data.std, data.squash)
    assert None not in fields, "expected a resolved configuration"
    return ImagePreprocess(*fields)  # type: ignore[arg-type]


class ImageData(pl.LightningDataModule):
    """The batches of a configuration.

    Raises OSError and ValueError for images that are not there or do not fit, and, while training, ValueError where
    more images than ``data.max_broken`` could not be read. Each is named on stderr once, and left out of its batch.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.broken: set[str] = set()
        devices, nodes = config.processes()
        self.processes = devices * nodes
        self.images: tuple[Images, Images] | None = None
        if not is_shards(config.data.name):
            self.images = load_images(config.data)
            self.classes = list(self.images[0].classes)
            found = len(self.images[0].labels)
        else:
            self.classes, found = _check_shards(config.data)
        images = config.data.batch_size * self.processes
        if found < images:
            raise ValueError(
                f"data.batch_size: expected at most the {found} images of {config.data.name}, got {images}"
            )
        self.batches = found // images

    def train_dataloader(self) -> Any:
        """Whole batches of changed images, in another order in each epoch."""
        epoch, batches = _position(self.trainer)
        config = self.config.at_epoch(epoch)
        transform = training_transform(config)
        if self.images is None:
            seeds = (config.training.seed, epoch, self._share()[0])
            size = config.data.batch_size
            return self._loader(ShardStream(config.data.name, transform, len(self.classes), seeds, size, batches))
        samples = SampleSet(self.images[0], transform, config.training.seed)
        sampler = EpochSampler(len(self.images[0].labels), config.training.seed, True, *self._share())
        sampler.skip_to(epoch, batches * config.data.batch_size)
        return self._loader(samples, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> Any:
        """All images to validate with, in order and as the network will be used."""
        transform = preprocess_of(self.config.data)
        if self.images is None:
            return self._loader(_all_of_shards(self.config.data.validation or "", transform, len(self.classes)))
        samples = SampleSet(self.images[1], transform, 0)
        sampler = EpochSampler(len(self.images[1].labels), 0, False, *self._share())
        return self._loader(samples, sampler=sampler)

    def _share(self) -> tuple[int, int]:
        """This process, and how many there are: not what the configuration says, which evaluation reads, too."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, samples: Any, **options: Any) -> Any:
        data = self.config.data
        # The named data sets are in memory, and need less time to be read than a network on the CPU.
        default = 0 if self.images is not None and not os.path.isdir(data.name) else min(os.cpu_count() or 1, 8)
        workers = default if data.workers is None else data.workers
        return DataLoader(
            samples,
            data.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Workers' seeds are not drawn from those of dropout and stochastic depth.
            generator=torch.Generator("cpu"),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Names the images that could not be read."""
        limit = self.config.data.max_broken
        for message in batch.broken:
            if message not in self.broken:
                self.broken.add(message)
                say(f"effnet: skipped {printable(message)}", sys.stderr)
        if len(self.broken) > limit:
            raise ValueError(
                f"data.max_broken: expected at most {limit} images that cannot be read, got {len(self.broken)}; "
                f"--max-broken N allows N"
            )
        return batch


def _position(trainer: pl.Trainer | None) -> tuple[int, int]:
    """The epoch that training begins or goes on with, and the batches of it that are done."""
    if trainer is None:
        return 0, 0
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return epoch.processed, batches if epoch.started > epoch.processed else 0


def is_shards(name: str) -> bool:
    """Whether the name of a data set is a pattern of WebDataset's shards."""
    return name.endswith(".tar") or "://" in name


def _check_shards(data: Data) -> tuple[list[str], int]:
    """The classes, and the number of images, which shards do not tell."""
    missing = [name for name in ("validation", "train_images", "classes") if getattr(data, name) is None]
    if missing:
        raise ValueError(f"data.name: shards need {', '.join(f'data.{name}' for name in missing)} beside them")
    return list(data.classes or ()), data.train_images or 0


class ShardStream(IterableDataset[Sample]):
    """Samples of WebDataset's shards, each drawn at random, without end.

    What is drawn depends on the seeds, the number of workers and the place in the stream alone. An epoch that goes on
    reads the samples that it has seen once more, without decoding their images.

    Args:
        pattern: of the shards' names.
        transform: from a PIL image to the network's input.
        classes: how many there are.
        seeds: of the run, the epoch and the process.
        batch_size: samples that a worker gives at a time.
        batches: how many of the epoch are done.
    """

    def __init__(
        self,
        pattern: str,
        transform: Callable[[Any], Tensor],
        classes: int,
        seeds: tuple[int, ...],
        batch_size: int,
        batches: int,
    ) -> None:
        self.pattern = pattern
        self.transform = transform
        self.classes = classes
        self.seeds = seeds
        self.batch_size = batch_size
        self.batches = batches

    def __iter__(self) -> Iterator[Sample]:
        import webdataset

        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        # Workers give a batch in turn, the first begins: its stream is the one whose turn it is where training goes on.
        stream = (self.batches + worker) % workers
        done = len(range(stream, self.batches, workers)) * self.batch_size
        seed = _seed_of(*self.seeds, stream)
        entries = webdataset.DataPipeline(
            webdataset.ResampledShards(self.pattern, seed=seed, worker_seed=int, deterministic=True),
            webdataset.tarfile_to_samples(),
            webdataset.detshuffle(1000, seed=seed),
        )
        for number, entry in enumerate(entries):
            if number >= done:
                with _seeded(seed, number):
                    sample = _sample_of_shard(self.transform, self.classes, entry)
                yield sample


def _all_of_shards(pattern: str, transform: Callable[[Any], Tensor], classes: int) -> Any:
    """Each sample of the shards once, in order; of several processes, each takes some of the shards."""
    import webdataset

    stream = webdataset.WebDataset(
        pattern, shardshuffle=False, empty_check=False, nodesplitter=webdataset.split_by_node
    )
    return stream.map(partial(_sample_of_shard, transform, classes))


def _sample_of_shard(transform: Callable[[Any], Tensor], classes: int, entry: dict[str, Any]) -> Sample:
    name = f"{entry['__url__']}: {entry['__key__']}"
    found = [key for key in entry if f".{key.rpartition('.')[2].lower()}" in PHOTO_SUFFIXES]
    label = int(entry["cls"]) if entry.get("cls", b"").strip().isdigit() else -1
    if not found or not 0 <= label < classes:
        return Sample(
            None, 0, f"{name}: expected an image and a class from 0 to {classes - 1} in cls, got {sorted(entry)}"
        )
    return make_sample(partial(read_photo, io.BytesIO(entry[found[0]]), name), transform, label, name)
