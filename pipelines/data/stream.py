"""From a dataset folder to batches of fixed shape: read, decode, transform, one batch ahead.

`ShardReader` knows where the bytes lie, `TrainStream` and `EvalStream` what is read when and
by whom. The order itself comes from `order`, the pixels from `transforms`. Which thread does
what never shows in a batch: every row is a function of (seed, epoch, sample).

Threads, not processes: Pillow releases the interpreter's lock while it decodes and resizes.
"""

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data import order, transforms
from pipelines.data.batch import Batch
from pipelines.data.manifest import INDEX, MANIFEST, Manifest, read_index, read_manifest
from pipelines.data.order import Position
from pipelines.data.transforms import Pixels, SampleRandom
from pipelines.errors import DatasetError, RunError

# Maps held at a time: each keeps a file descriptor, and 1,024 are a common limit.
_OPEN_SHARDS = 256
# Rows are handed to threads in pieces: enough of them to even out large and small images,
# few enough that handing over costs little beside a 32-pixel image.
_PIECES_PER_THREAD = 4
_AHEAD = 1

Tag = TypeVar("Tag")


class ShardReader:
    """Random access to the samples of a finished dataset folder; safe to share by threads.

    Attributes:
        folder: The dataset folder.
        manifest: The dataset's manifest.
        labels: Label of every sample, int64, shape [num_samples].
    """

    def __init__(self, folder: Path) -> None:
        """Open a dataset folder and check that shards and index fit the manifest.

        Hashes are not read here; that is what `mone verify` does.

        Raises:
            DatasetError: No finished dataset, a shard that is missing or of another size, or
                an index of other samples.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        table = read_index(folder)
        self._keys = table["key"].combine_chunks()
        self._shards: NDArray[np.int32] = table["shard"].to_numpy()
        self._offsets: NDArray[np.int64] = table["jpg_offset"].to_numpy()
        self._sizes: NDArray[np.int64] = table["jpg_size"].to_numpy()
        self.labels: NDArray[np.int64] = table["label"].to_numpy().astype(np.int64)
        _check_shards(folder, self.manifest)
        self._check_index()
        self._map = lru_cache(maxsize=_OPEN_SHARDS)(self._map_shard)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes in the manifest, those without samples included."""
        return len(self.manifest.classes)

    def sample(self, i: int) -> tuple[str, bytes, int]:
        """The key, image file and label of sample `i`, counted in shard order."""
        start = int(self._offsets[i])
        data = self._map(int(self._shards[i]))[start : start + int(self._sizes[i])]
        return self._keys[i].as_py(), data, int(self.labels[i])

    def path_of(self, i: int) -> Path:
        """The shard file that holds sample `i`."""
        return self._path(int(self._shards[i]))

    def close(self) -> None:
        """Let go of the shard files; reading again opens them again."""
        self._map.cache_clear()

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def _map_shard(self, shard: int) -> mmap.mmap:
        with self._path(shard).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_index(self) -> None:
        records = self.manifest.shards
        inside = (self._shards >= 0) & (self._shards < len(records))
        sizes = np.array([*(record.bytes for record in records), -1], np.int64)
        ends = sizes[np.where(inside, self._shards, -1)]
        fits = (self._offsets >= 0) & (self._sizes >= 0) & (self._offsets + self._sizes <= ends)
        fits &= (self.labels >= 0) & (self.labels < self.num_classes)
        if not fits.all():
            raise DatasetError(
                f"{self.folder / INDEX} places sample {self._keys[int(np.argmin(fits))].as_py()!r} "
                f"outside its shard or its {self.num_classes} classes; {_repair(self.folder)}"
            )
        counts = np.bincount(self._shards, minlength=len(records)).tolist()
        for record, count in zip(records, counts, strict=True):
            if count != record.samples:
                raise DatasetError(
                    f"{self.folder / INDEX} lists {count} samples of {record.name}, {MANIFEST} "
                    f"says {record.samples}; {_repair(self.folder)}"
                )


class TrainStream:
    """Endless training batches of one rank, in an order that no machine influences.

    Attributes:
        num_samples: Samples in the dataset.
        num_classes: Classes in the dataset.
        steps_per_epoch: Global batches in an epoch; fewer than a batch's samples are dropped.
    """

    def __init__(
        self,
        folder: Path,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        crop_area: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: float,
        threads: int,
    ) -> None:
        """Open a dataset for training.

        Args:
            folder: A finished dataset folder.
            image_size: Height and width of the pixels in a batch.
            batch_size: Samples of a step on all ranks together.
            seed: Seed of the order and of the augmentation.
            rank: This rank, from 0.
            world: Number of ranks.
            crop_area: Least and greatest share of an image that a crop takes.
            crop_ratio: Least and greatest width / height of a crop.
            flip: Probability of exchanging left and right.
            threads: Threads that decode.

        Raises:
            DatasetError: The folder is not a sound dataset or has less than one batch.
            RunError: The ranks cannot share the batch evenly.
        """
        rank_batch = order.rank_batch_size(batch_size, world)
        self._reader = ShardReader(folder)
        self.num_samples = self._reader.num_samples
        self.num_classes = self._reader.num_classes
        self.steps_per_epoch = order.steps_per_epoch(self.num_samples, batch_size)
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._loader = _Loader(self._reader, image_size, rows=rank_batch, threads=threads)
        self._transform = partial(
            transforms.train_transform,
            size=image_size,
            crop_area=crop_area,
            crop_ratio=crop_ratio,
            flip=flip,
        )

    def batches(self, start: Position) -> Generator[tuple[Batch, Position], None, None]:
        """Batches from a position on, without end; closing the iterator ends its threads.

        Args:
            start: The first batch to read, as `position_at` or an earlier batch gave it.

        Returns:
            An iterator of batches, each with the position that follows it: the one to resume
            from once the batch has been used. A sample that does not decode ends it with a
            DatasetError that names shard and key.

        Raises:
            RunError: The position is of another seed or not in an epoch of this stream.
        """
        if start.seed != self._seed:
            raise RunError(
                f"the data position was made with seed {start.seed}, but the run has seed "
                f"{self._seed}; set train.seed to {start.seed} or start a fresh run"
            )
        if start.epoch < 0 or not 0 <= start.step < self.steps_per_epoch:
            raise RunError(
                f"the data position is step {start.step} of epoch {start.epoch}, but an epoch "
                f"has {self.steps_per_epoch} steps of {self._batch_size} samples here; resume "
                "with the run's own dataset and batch size or start a fresh run"
            )
        return self._loader.run(self._jobs(start))

    def close(self) -> None:
        """Let go of the shard files."""
        self._reader.close()

    def _jobs(self, position: Position) -> "Iterator[_Job[Position]]":
        while True:
            epoch = position.epoch
            samples = order.epoch_order(self.num_samples, seed=self._seed, epoch=epoch)
            pixels = partial(self._pixels, epoch)
            for step in range(position.step, self.steps_per_epoch):
                position = position.after(steps_per_epoch=self.steps_per_epoch)
                mine = order.batch_samples(
                    samples, step, batch_size=self._batch_size, rank=self._rank, world=self._world
                )
                yield _Job(samples=mine, pixels=pixels, tag=position)

    def _pixels(self, epoch: int, sample: int, data: bytes) -> Pixels:
        rng = SampleRandom(order.sample_seed(self._seed, epoch, sample))
        return self._transform(data, rng=rng)


class EvalStream:
    """Every sample exactly once over all ranks, in shard order, as often as it is iterated.

    All ranks give equally many batches of equal shape, so that collectives meet; rows beyond
    the last sample are black, have label 0 and `valid_B` False.

    Attributes:
        num_samples: Samples in the dataset, over all ranks.
        num_classes: Classes in the dataset.
    """

    def __init__(
        self,
        folder: Path,
        *,
        image_size: int,
        resize: int,
        batch_size: int,
        rank: int,
        world: int,
        threads: int,
    ) -> None:
        """Open a dataset for evaluation.

        Args:
            folder: A finished dataset folder.
            image_size: Height and width of the pixels in a batch.
            resize: Short side that images are scaled to before the centre is cut out.
            batch_size: Samples of a batch on this rank.
            rank: This rank, from 0.
            world: Number of ranks.
            threads: Threads that decode.

        Raises:
            DatasetError: The folder is not a sound dataset.
            RunError: The centre to cut out is larger than the scaled image.
        """
        if resize < image_size:
            raise RunError(
                f"images scaled to a short side of {resize} pixels hold no centre of {image_size}; "
                f"set data.eval_resize to {image_size} or more"
            )
        self._reader = ShardReader(folder)
        self.num_samples = self._reader.num_samples
        self.num_classes = self._reader.num_classes
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._loader = _Loader(self._reader, image_size, rows=batch_size, threads=threads)
        self._transform = partial(transforms.eval_transform, size=image_size, resize=resize)

    def __len__(self) -> int:
        """Batches on every rank."""
        return -(-self.num_samples // (self._batch_size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches, from the first; closing the iterator ends its threads."""
        with closing(self._loader.run(self._jobs())) as batches:
            for batch, _ in batches:
                yield batch

    def close(self) -> None:
        """Let go of the shard files."""
        self._reader.close()

    def _jobs(self) -> "Iterator[_Job[None]]":
        for step in range(len(self)):
            start = (step * self._world + self._rank) * self._batch_size
            mine = np.arange(start, min(start + self._batch_size, self.num_samples))
            yield _Job(samples=mine, pixels=self._pixels, tag=None)

    def _pixels(self, _sample: int, data: bytes) -> Pixels:
        return self._transform(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job(Generic[Tag]):
    """One batch to make: its samples, how a sample's bytes become pixels, what to hand on."""

    samples: NDArray[np.int64]
    pixels: Callable[[int, bytes], Pixels]
    tag: Tag


class _Loader:
    """Makes batches of `rows` samples in threads, one ahead of whoever consumes them."""

    def __init__(self, reader: ShardReader, image_size: int, *, rows: int, threads: int) -> None:
        self._reader, self._threads = reader, threads
        self._shape = (rows, image_size, image_size, 3)

    def run(self, jobs: Iterable[_Job[Tag]]) -> Generator[tuple[Batch, Tag], None, None]:
        """Batches of the jobs, in their order, each with its job's tag."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        started: deque[tuple[Batch, list[Future[None]], Tag]] = deque()
        try:
            for job in jobs:
                started.append((*self._start(pool, job), job.tag))
                if len(started) > _AHEAD:
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, job: _Job[Tag]) -> tuple[Batch, list[Future[None]]]:
        rows, filled = self._shape[0], len(job.samples)
        pixels_BHWC, labels_B = np.zeros(self._shape, np.uint8), np.zeros(rows, np.int64)
        labels_B[:filled] = self._reader.labels[job.samples]
        piece = max(1, rows // (self._threads * _PIECES_PER_THREAD))
        futures = [
            pool.submit(self._fill, pixels_BHWC[i:], job.samples[i : i + piece], job.pixels)
            for i in range(0, filled, piece)
        ]
        batch = Batch(
            pixels_BHWC=torch.from_numpy(pixels_BHWC),
            labels_B=torch.from_numpy(labels_B),
            valid_B=torch.arange(rows) < filled,
        )
        return batch, futures

    def _fill(
        self,
        rows_BHWC: Pixels,
        samples: NDArray[np.int64],
        pixels: Callable[[int, bytes], Pixels],
    ) -> None:
        for row, sample in enumerate(samples.tolist()):
            key, data, _ = self._reader.sample(sample)
            try:
                rows_BHWC[row] = pixels(sample, data)
            except DatasetError as error:
                raise DatasetError(
                    f"sample {key!r} in {self._reader.path_of(sample)}: {error}; "
                    f"{_repair(self._reader.folder)}"
                ) from error


def _finished(batch: Batch, futures: list[Future[None]], tag: Tag) -> tuple[Batch, Tag]:
    for future in futures:
        future.result()
    return batch, tag


def _check_shards(folder: Path, manifest: Manifest) -> None:
    for record in manifest.shards:
        path = folder / record.name
        if not path.is_file():
            raise DatasetError(f"shard {path} is missing; {_repair(folder)}")
        size = path.stat().st_size
        if size != record.bytes:
            raise DatasetError(
                f"shard {path} has {size} bytes, {MANIFEST} says {record.bytes}; {_repair(folder)}"
            )


def _repair(folder: Path) -> str:
    return f"`mone verify {folder}` lists what was changed; restore it or make the shards again"
