"""From a sample's number to its pixels: read, decode, vary; and what happens where that fails.

`reader` knows where bytes lie, `transforms` and `clips` how they become pixels, `order` which seed
a sample has; here they meet. Which sample is wanted when, and by whom, is the subject of `stream`.

Axes: T frames, H height, W width, 3 red-green-blue, V views of a test.
"""

from collections.abc import Callable, Iterable
from functools import partial
from threading import Lock
from typing import NamedTuple

from pipelines.data.columns import repair
from pipelines.data.manifest import Manifest
from pipelines.data.order import sample_seed
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.transforms import Pixels, eval_image, train_image
from pipelines.data.reader import DamagedSampleError, SampleReader
from pipelines.data.settings import RowConfig
from pipelines.errors import DatasetError, PipelineError
from pipelines.storage import Place

_TRIES = 64  # samples in a row that do not decode before it cannot be chance


class Skipped(NamedTuple):
    """A sample that could not be made: its key and shard, and the reason."""

    name: str
    why: str


class TrainRow(NamedTuple):
    """Pixels for training, and the sample that they were made of.

    Attributes:
        pixels: uint8, shape [T, H, W, 3].
        sample: The sample asked for, or the one that took its place.
        skipped: The sample asked for, if another took its place.
    """

    pixels: Pixels
    sample: int
    skipped: Skipped | None = None


class Skips:
    """What whoever takes the batches went without.

    Attributes:
        count: Samples of theirs that the batches handed out so far went without.
        names: Those samples, each once, and why.
    """

    def __init__(self) -> None:
        self.count = 0
        self.names: dict[str, str] = {}

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Count and name what a batch goes without, as it is handed out."""
        for name, why in skipped:
            self.count += 1
            self.names.setdefault(name, why)


class Damage:
    """The budget of samples that cannot be made: too many end the run.

    Whatever was read counts, also ahead of its time and for mixing. The budget is a share of the
    epochs begun so far, each counted whole: a single bad sample among the first ten is no tenth of
    the data, and bad ones that come early do so in every epoch.

    Attributes:
        count: Rows that went without their sample so far.
    """

    def __init__(self, folder: Place, share: float, epoch: int) -> None:
        """Begin to count.

        Args:
            folder: The dataset folder, for messages.
            share: Share of the samples that may be skipped (`ReadConfig.corrupt_share`).
            epoch: Samples that this worker reads in an epoch, or in one evaluation.
        """
        self.count = 0
        self._folder, self._share, self._epoch = folder, share, max(1, epoch)
        self._read, self._lock = 0, Lock()

    def read(self, samples: int) -> None:
        """Count samples that are about to be read, good or bad."""
        with self._lock:
            self._read += samples

    def skip(self, name: str, why: str) -> None:
        """Count a sample that was skipped.

        Raises:
            DatasetError: These are more than the budget.
        """
        with self._lock:
            self.count += 1
            among = max(1, -(-self._read // self._epoch)) * self._epoch
            if self.count > self._share * among:
                raise DatasetError(
                    f"{self.count} of {among} samples were skipped, more than "
                    f"data.read.corrupt_share ({self._share:g}) allows; the last is {name}: {why}; "
                    f"{repair(self._folder)}"
                )


class Rows:
    """Makes the pixels of samples; threads may share it.

    Attributes:
        views: Views of a sample in a test.
        damage: The budget of what may be skipped.
    """

    def __init__(
        self,
        reader: SampleReader,
        config: RowConfig,
        *,
        seed: int,
        samples_per_epoch: int,
    ) -> None:
        """Choose how the reader's media become pixels.

        Args:
            reader: An open dataset.
            config: How.
            seed: Seed of the augmentation.
            samples_per_epoch: Samples that this worker reads in an epoch, or in one evaluation.

        Raises:
            DatasetError: The dataset holds images and the model takes clips, or the reverse.
        """
        read, augment, clip = config.read, config.augment, config.clip
        frames, size, resize = config.frames, config.image_size, config.resize
        _check_media(reader.folder, reader.manifest, frames)
        self.damage = Damage(reader.folder, read.corrupt_share, samples_per_epoch)
        self.views = clip.views_of(frames)
        self._reader, self._seed, self._skips = reader, seed, read.on_corrupt == "skip"
        self._train: Callable[..., Pixels] = partial(
            train_image, size=size, augment=augment, decoder=read.decoder
        )
        self._test: Callable[[bytes], Pixels] = partial(
            eval_image, size=size, resize=resize, decoder=read.decoder
        )
        if frames > 1:
            # Here, since what is not needed for images takes 20 MB.
            from pipelines.data.pixels.clips import eval_clips, train_clip

            self._train = partial(
                train_clip, frames=frames, size=size, resize=resize, clip=clip, augment=augment
            )
            self._test = partial(eval_clips, frames=frames, size=size, resize=resize, clip=clip)

    def train(self, sample: int, epoch: int) -> TrainRow:
        """A sample's pixels in an epoch: a function of seed, epoch and sample alone.

        With `on_corrupt="skip"` a sample that cannot be made gives its place, and its random
        numbers, to the next one in shard order that can; the first follows the last.

        Raises:
            DatasetError: It cannot be made and none may, or can, take its place.
        """
        seed = sample_seed(self._seed, epoch, sample)
        try:
            return TrainRow(self._training(sample, seed), sample)
        except DamagedSampleError as error:
            skipped = self._skip(sample, error)
            why = error
        tried = min(_TRIES, self._reader.num_samples)
        for other in range(sample + 1, sample + tried):
            instead = other % self._reader.num_samples
            try:
                return TrainRow(self._training(instead, seed), instead, skipped)
            except DamagedSampleError as error:
                why = error
        raise DatasetError(
            f"{self._reader.name(sample)} and the {tried - 1} samples after it cannot be used, "
            f"the last of them: {why}; {repair(self._reader.folder)}"
        )

    def test(self, sample: int) -> Pixels | Skipped:
        """A sample's views for a test, uint8, shape [V, T, H, W, 3].

        Returns:
            With `on_corrupt="skip"` the reason if it cannot be made: a test must not count another
            twice.

        Raises:
            DatasetError: It cannot be made, and may not be left out.
        """
        try:
            pixels = self._made(sample, self._test)
        except DamagedSampleError as error:
            return self._skip(sample, error)
        return pixels[None, None] if pixels.ndim == 3 else pixels

    def _training(self, sample: int, seed: int) -> Pixels:
        pixels = self._made(sample, partial(self._train, rng=SampleRandom(seed)))
        return pixels[None] if pixels.ndim == 3 else pixels

    def _made(self, sample: int, make: Callable[[bytes], Pixels]) -> Pixels:
        try:
            data = self._reader.read(sample)
            try:
                return make(data)
            except DatasetError as error:
                raise DamagedSampleError(str(error)) from error
        except PipelineError:
            raise
        except Exception as error:  # ours, not the data's: say at least where it happened
            error.add_note(f"in {self._reader.name(sample)}")
            raise

    def _skip(self, sample: int, error: DamagedSampleError) -> Skipped:
        name = self._reader.name(sample)
        if not self._skips:
            raise DatasetError(
                f"{name}: {error}; {repair(self._reader.folder)}, or set data.read.on_corrupt to "
                "skip"
            ) from error
        self.damage.skip(name, str(error))
        return Skipped(name, str(error))


def _check_media(folder: Place, manifest: Manifest, frames: int) -> None:
    if manifest.media == "image" and frames > 1:
        raise DatasetError(
            f"{folder} holds images, but model.video.frames is {frames}; set model.video.frames to "
            "1 or data.root to a dataset of videos"
        )
    if manifest.media == "video" and frames == 1:
        raise DatasetError(
            f"{folder} holds videos, but model.video.frames is 1; set model.video.frames to the "
            "frames of a clip, such as 32, or data.root to a dataset of images"
        )
