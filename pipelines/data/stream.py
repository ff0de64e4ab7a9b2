"""From a dataset folder to batches of fixed shape: who reads what, when.

`TrainStream` follows `order`, `EvalStream` the shards; `rows` makes pixels, `jobs` batches of them,
`loader` has the threads. Which thread does what never shows in a batch: every row is a function of
(seed, epoch, sample).
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing

import numpy as np

from pipelines.data.batch import Batch
from pipelines.data.jobs import TestJob, TrainJob
from pipelines.data.loader import Loader
from pipelines.data.manifest import MANIFEST
from pipelines.data.order import Position, SampleOrder, rank_rows
from pipelines.data.reader import SampleReader
from pipelines.data.rows import Rows, Skips
from pipelines.data.settings import OrderConfig, ReadConfig, RowConfig
from pipelines.errors import DatasetError, RunError
from pipelines.storage import Place

_SHARDS_AHEAD = 4  # that an evaluation of an object store fetches before it comes to them


class TrainStream:
    """Endless training batches of one rank, in an order that no machine influences.

    Attributes:
        num_samples: Samples in the dataset.
        num_classes: Classes in the dataset.
        steps_per_epoch: Global batches in an epoch; fewer than a batch's samples are dropped.
    """

    def __init__(
        self,
        folder: Place,
        config: RowConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        order: OrderConfig,
        host_ranks: int = 1,
        digest: str | None = None,
    ) -> None:
        """Open a dataset for training.

        Args:
            folder: A finished dataset folder.
            config: What becomes of its samples.
            batch_size: Samples of a step on all ranks together.
            seed: Seed of the order and of the augmentation.
            rank: This rank, from 0.
            world: Number of ranks.
            order: Lanes and windows of the order.
            host_ranks: Ranks on this machine, which share its cache of an object store's shards.
            digest: Of the manifest that the folder must have; None: any.

        Raises:
            DatasetError: The folder is not a sound dataset of labelled images (or videos, as
                `frames` says), has another manifest or less than one batch, is not to be flipped,
                or the cache is too small.
            RunError: The batch cannot be shared evenly by lanes and ranks.
        """
        lanes = order.lanes_of(batch_size)
        first, self._rows = rank_rows(batch_size, lanes, rank=rank, world=world)
        before = config.augment.mixed - 1
        # What is read: with mixup, the rows before this rank's first come first.
        self._read_rows = first - before, self._rows + before
        self._reader = _opened(folder, config.read, digest, sharers=host_ranks)
        _check_flips(self._reader, config.augment.flip)
        self._order = SampleOrder(
            shard_samples=self._reader.shard_samples,
            batch_size=batch_size,
            lanes=lanes,
            window=order.window,
            seed=seed,
        )
        self.num_samples = self._reader.num_samples
        self.num_classes = self._reader.num_classes
        self.steps_per_epoch = self._order.steps_per_epoch
        self._reader.check_cache(self._order.most_shards(*self._read_rows, ranks=host_ranks))
        self._maker = Rows(
            self._reader,
            config,
            seed=seed,
            samples_per_epoch=self.steps_per_epoch * min(self._rows + before, batch_size),
        )
        self._skips = Skips()
        self._augment = config.augment
        self._shape = (config.frames, config.image_size, config.image_size, 3)
        self._loader = _loader(config.read)

    @property
    def skipped(self) -> int:
        """Samples of this rank that another took the place of in the batches so far."""
        return self._skips.count

    @property
    def skipped_samples(self) -> Mapping[str, str]:
        """These samples, each once, and why."""
        return self._skips.names

    def batches(self, start: Position) -> Generator[tuple[Batch, Position], None, None]:
        """Batches from a position on, without end; closing the iterator ends its threads.

        Args:
            start: The first batch to read, as `position_at` or an earlier batch gave it.

        Returns:
            An iterator of batches, each with the position that follows it: the one to resume
            from once the batch has been used. A sample that cannot be made ends it with a
            DatasetError that names shard and key, unless it may be skipped.

        Raises:
            RunError: The position is of another seed or not in an epoch of this stream.
        """
        if start.seed != self._order.seed:
            raise RunError(
                f"the data position was made with seed {start.seed}, but the run has seed "
                f"{self._order.seed}; set train.seed to {start.seed} or start a fresh run"
            )
        if start.epoch < 0 or not 0 <= start.step < self.steps_per_epoch:
            raise RunError(
                f"the data position is step {start.step} of epoch {start.epoch}, but an epoch "
                f"has {self.steps_per_epoch} steps of {self._order.batch_size} samples here; "
                "resume with the run's own dataset and batch size or start a fresh run"
            )
        return self._loader.run(self._jobs(start))

    def close(self) -> None:
        """Let go of the shard files."""
        self._reader.close()

    def _jobs(self, position: Position) -> Iterator[TrainJob]:
        window = None
        while True:
            epoch, step = position.epoch, position.step
            if window != (epoch, self._order.window_of(step)):
                window = (epoch, self._order.window_of(step))
                ahead = self._order.shards_ahead(epoch, step, *self._read_rows)
                self._reader.prefetch(ahead)
            position = position.after(steps_per_epoch=self.steps_per_epoch)
            yield self._job(epoch, step, position)

    def _job(self, epoch: int, step: int, after: Position) -> TrainJob:
        _, rows = self._read_rows
        samples = self._order.rows(epoch, step, *self._read_rows)
        mix_shape = (self._rows, self._augment.mixed)
        return TrainJob(
            maker=self._maker,
            skips=self._skips,
            augment=self._augment,
            seed=self._order.seed,
            epoch=epoch,
            samples=samples.tolist(),
            repeated=max(0, rows - self._order.batch_size),
            period=self._order.batch_size,
            pixels_RTHWC=np.empty((rows, *self._shape), np.uint8),
            labels_R=self._reader.labels[samples].astype(np.int64),
            labels=self._reader.labels,
            mix_BM=np.empty(mix_shape, np.float32) if rows > self._rows else None,
            after=after,
        )


class EvalStream:
    """Every sample exactly once over all ranks, in shard order, as often as it is iterated.

    All ranks give equally many batches of equal shape, so that collectives meet; samples beyond
    the last, and those that may be skipped and cannot be made, are black, have label 0 and
    `valid_B` False.

    Attributes:
        num_samples: Samples in the dataset, over all ranks.
        num_classes: Classes in the dataset.
    """

    def __init__(
        self,
        folder: Place,
        config: RowConfig,
        *,
        batch_size: int,
        rank: int,
        world: int,
        digest: str | None = None,
    ) -> None:
        """Open a dataset for evaluation.

        Args:
            folder: A finished dataset folder.
            config: What becomes of its samples; nothing is varied.
            batch_size: Rows of pixels of a batch on this rank, at most; a sample's views stay
                together, and a batch has at least one sample.
            rank: This rank, from 0.
            world: Number of ranks.
            digest: Of the manifest that the folder must have; None: any.

        Raises:
            DatasetError: The folder is not a sound dataset of labelled images (or videos, as
                `frames` says), or has another manifest.
            RunError: The views to cut out are larger than the scaled sample.
        """
        size = config.image_size
        if config.resize < size:
            raise RunError(
                f"images scaled to a short side of {config.resize} pixels hold no centre of "
                f"{size}; set data.eval_resize to {size} or more"
            )
        self._reader = _opened(folder, config.read, digest)
        self.num_samples = self._reader.num_samples
        self.num_classes = self._reader.num_classes
        self._samples = max(1, batch_size // config.clip.views_of(config.frames))
        self._rank, self._world = rank, world
        self._maker = Rows(
            self._reader,
            config,
            seed=0,
            samples_per_epoch=sum(len(self._mine(step)) for step in range(len(self))),
        )
        self._skips = Skips()
        self._shape = (self._maker.views, config.frames, size, size, 3)
        self._loader = _loader(config.read)

    def __len__(self) -> int:
        """Batches on every rank."""
        return -(-self.num_samples // (self._samples * self._world))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches, from the first; closing the iterator ends its threads."""
        with closing(self._loader.run(self._jobs())) as batches:
            yield from batches

    @property
    def skipped(self) -> int:
        """Samples of this rank that were left out of the batches so far."""
        return self._skips.count

    @property
    def skipped_samples(self) -> Mapping[str, str]:
        """These samples, each once, and why."""
        return self._skips.names

    def close(self) -> None:
        """Let go of the shard files."""
        self._reader.close()

    def _jobs(self) -> Iterator[TestJob]:
        ends = np.cumsum(self._reader.shard_samples)
        prefetched = -1
        for step in range(len(self)):
            mine = self._mine(step)
            shard = int(np.searchsorted(ends, mine.start, side="right"))
            if shard != prefetched:
                self._reader.prefetch(range(shard, min(shard + _SHARDS_AHEAD, len(ends))))
                prefetched = shard
            labels_B = np.zeros(self._samples, np.int64)
            labels_B[: len(mine)] = self._reader.labels[mine.start : mine.stop]
            yield TestJob(
                maker=self._maker,
                skips=self._skips,
                samples=mine,
                pixels_BVTHWC=np.empty((self._samples, *self._shape), np.uint8),
                labels_B=labels_B,
                valid_B=np.arange(self._samples) < len(mine),
            )

    def _mine(self, step: int) -> range:
        """Samples of this rank's batch of a step; none beyond the last sample."""
        start = (step * self._world + self._rank) * self._samples
        return range(start, min(start + self._samples, self.num_samples))


def _loader(read: ReadConfig) -> Loader:
    return Loader(threads=read.threads, prefetch=read.prefetch)


def _opened(
    folder: Place, read: ReadConfig, digest: str | None, *, sharers: int = 1
) -> SampleReader:
    """The dataset, if it is the one that is meant and all of it has labels."""
    reader = SampleReader(folder, read, sharers=sharers)
    if digest is not None and reader.manifest.digest != digest:
        raise DatasetError(
            f"{folder} was changed since the run began: its {MANIFEST} is another; give the data "
            "that it began with, or start a new run with --out"
        )
    unknown = int((reader.labels < 0).sum())
    if unknown:
        raise DatasetError(
            f"{unknown} of the {reader.num_samples} samples in {folder} have no label, "
            "which training and scoring need; use a part of the release that has labels"
        )
    return reader


def _check_flips(reader: SampleReader, flip: float) -> None:
    layouts = {source.layout for source in reader.manifest.sources}
    if flip > 0 and "ssv2" in layouts:
        raise DatasetError(
            f"data.augment.flip is {flip:g}, but {reader.folder} holds Something-Something-v2, "
            "whose classes tell left from right; set data.augment.flip to 0"
        )
