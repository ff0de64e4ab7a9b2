"""Which sample comes when: integers in, integers out.

The order of an epoch is a pure function of (seed, epoch, samples of every shard):

1. the shards are permuted, their samples written one after the other, and the list rotated by an
   offset (a few shards alone have few orders);
2. what the last whole batch leaves over, less than a batch, is dropped (`SampleOrder.dropped`);
3. the rest is cut into `lanes` equal segments, and in each of them every `window` samples that
   follow each other are permuted;
4. a global batch takes equally many samples of every lane, the lanes' next ones, in their order.

So a batch mixes shards from all over the dataset, while what is read next lies within a window of
every lane, close together on disk. Ranks take whole lanes, rows of a global batch that follow each
other: the same samples make up a step however many ranks share it, and resuming is arithmetic, a
`Position` is three integers. No list of all samples is ever made. Nothing here opens a file (see
`reader`) or draws a crop (see `transforms`, which takes its seeds from here).

Randomness is splitmix64's finaliser (Steele, Lea and Flood 2014) over counters, written out
here: the streams of library generators may change between versions, and a resumed run must
see the same samples years later on another machine. Different purposes hash with different
first words, so a sample's place in the epoch says nothing about its crop.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DatasetError, RunError

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
WORD_MASK = (1 << 64) - 1
_SHARDS, _AUGMENTATION, _ROTATION, _WINDOW = 1, 2, 3, 4  # 1 and 2 as ever, or crops would change

Samples = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where training stands in the data: the batch to read next. A checkpoint keeps it as JSON.

    Attributes:
        seed: Seed of the order and of the augmentation.
        epoch: Epochs that are over.
        step: Batches of this epoch that are over, below `steps_per_epoch`.
    """

    seed: int
    epoch: int
    step: int

    def after(self, *, steps_per_epoch: int) -> "Position":
        """The position one batch later; the last batch of an epoch leads to the next epoch."""
        ends, step = divmod(self.step + 1, steps_per_epoch)
        return Position(seed=self.seed, epoch=self.epoch + ends, step=step)


@overload
def mix64(word: int) -> int: ...
@overload
def mix64(word: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def mix64(word: Any) -> Any:
    """Scramble 64-bit words, one to one: distinct words stay distinct.

    Args:
        word: An int in [0, 2^64) or a uint64 array.
    """
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return word ^ (word >> 31)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleOrder:
    """The order of a dataset's samples in every epoch; see the module docstring.

    Samples are numbered from 0 in shard order. Windows in use are kept, one per lane.

    Attributes:
        shard_samples: Samples of every shard.
        batch_size: Samples of a global batch.
        lanes: Segments that an epoch is cut into; divides `batch_size`.
        window: Samples of a lane that are permuted among each other.
        seed: Seed of the run.
    """

    shard_samples: tuple[int, ...] | NDArray[np.int64]
    batch_size: int
    lanes: int
    window: int
    seed: int
    _starts: Samples = field(init=False, repr=False)
    _epochs: "dict[int, _Epoch]" = field(init=False, repr=False, default_factory=dict)
    _windows: "dict[int, _Window]" = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check that batches fit lanes and dataset.

        Raises:
            RunError: The lanes do not divide the batch.
            DatasetError: There are fewer samples than one batch takes.
        """
        _check_lanes(self.batch_size, self.lanes)
        counts = np.asarray(self.shard_samples, np.int64)
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(counts)]))
        steps_per_epoch(self.num_samples, self.batch_size)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return int(self._starts[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.num_samples // self.batch_size

    def rows(self, epoch: int, step: int, first: int, count: int) -> Samples:
        """Samples of some rows of a global batch.

        Args:
            epoch: Epoch, from 0.
            step: Step in the epoch, from 0, below `steps_per_epoch`.
            first: The first row; any integer, rows are counted modulo `batch_size`.
            count: How many rows, from `first` on.

        Returns:
            Sample numbers, shape [count].

        Raises:
            ValueError: An epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        each = self.batch_size // self.lanes
        begin, end = step * each, (step + 1) * each
        low, skip = divmod(first, each)
        lanes = range(low, low + -(-(skip + count) // each))
        parts = [self._of_lane(epoch, lane % self.lanes, begin, end) for lane in lanes]
        return np.concatenate(parts)[skip : skip + count] if parts else np.empty(0, np.int64)

    def dropped(self, epoch: int) -> Samples:
        """The samples that this epoch leaves out, fewer than a batch; the next leaves out others.

        Returns:
            Sample numbers in the order in which they would have come, shape [less than a batch].
        """
        return self._at(epoch, self.steps_per_epoch * self.batch_size, self.num_samples)

    def window_of(self, step: int) -> int:
        """Which window of its lane a step's first row comes from."""
        return step * (self.batch_size // self.lanes) // self.window

    def shards_ahead(self, epoch: int, step: int, first: int, count: int) -> list[int]:
        """Shards that rows will be read from: those of the windows in use, then of the next ones.

        Args:
            epoch: Epoch, from 0.
            step: Step in the epoch, from 0.
            first: The first row, counted modulo `batch_size`.
            count: How many rows, from `first` on.

        Returns:
            Shard numbers, each once, those needed first in front.
        """
        now = self.window_of(step)
        there = self.shards_in(epoch, now, first, count)
        if (now + 1) * self.window < self._lane:
            return _once([*there, *self.shards_in(epoch, now + 1, first, count)])
        return _once([*there, *self.shards_in(epoch + 1, 0, first, count)])

    def shards_in(self, epoch: int, window: int, first: int, count: int) -> list[int]:
        """Shards that one window of every lane of some rows lies in, each once."""
        each = self.batch_size // self.lanes
        shards: list[int] = []
        for lane in range(first // each, -(-(first + count) // each)):
            low, high = self._bounds(lane % self.lanes, window)
            shards += self._epoch(epoch).shards(low, high)
        return _once(shards)

    def most_shards(self, first: int, count: int, *, ranks: int) -> int:
        """Shards that one window of every lane of some ranks lies in, at most, in whatever epoch.

        Args:
            first: The first row of one of the ranks, counted modulo `batch_size`.
            count: How many rows it has.
            ranks: Ranks with as many rows each.
        """
        each = self.batch_size // self.lanes
        lanes = min(self.lanes, ranks * (-(-(first + count) // each) - first // each))
        window = min(self.window, self._lane)
        # A window lies in a shard at either end and in the shards that fit in between, the more
        # the smaller they are. A few small ones, the last of a version, are not in every window:
        # of every number of smallest shards, those count once and the others for each window.
        ends = np.concatenate([[0], np.cumsum(np.sort(np.diff(self._starts)))])
        rare = np.arange(len(ends))
        between = np.searchsorted(ends, ends + max(window - 2, 0), side="right") - 1 - rare
        return min(len(ends) - 1, int((rare + lanes * (min(window, 2) + between)).min()))

    @property
    def _lane(self) -> int:
        """Samples of a lane."""
        return self.steps_per_epoch * (self.batch_size // self.lanes)

    def _bounds(self, lane: int, window: int) -> tuple[int, int]:
        """Where a window begins and ends in the rotated list."""
        start, low = lane * self._lane, window * self.window
        return start + low, start + min(low + self.window, self._lane)

    def _of_lane(self, epoch: int, lane: int, begin: int, end: int) -> Samples:
        """Samples of a lane from one place to another, windows permuted."""
        first, last = begin // self.window, (end - 1) // self.window
        if first == last:
            low = first * self.window
            return self._window(epoch, lane, first)[begin - low : end - low]
        whole = [self._window(epoch, lane, window) for window in range(first, last + 1)]
        low = first * self.window
        return np.concatenate(whole)[begin - low : end - low]

    def _window(self, epoch: int, lane: int, window: int) -> Samples:
        kept = self._windows.get(lane)
        if kept is None or kept.epoch != epoch or kept.window != window:
            samples = self._at(epoch, *self._bounds(lane, window))
            places = _permutation(len(samples), _hash(_WINDOW, self.seed, epoch, lane, window))
            kept = self._windows[lane] = _Window(epoch, window, samples[places])
        return kept.samples

    def _at(self, epoch: int, low: int, high: int) -> Samples:
        """Samples from one place of the rotated list to another, not permuted in windows."""
        return self._epoch(epoch).samples(low, high)

    def _epoch(self, epoch: int) -> "_Epoch":
        kept = self._epochs.get(epoch)
        if kept is None:
            kept = _Epoch.of(self._starts, self.seed, epoch)
            for old in [other for other in self._epochs if abs(other - epoch) > 1]:
                self._epochs.pop(old, None)
            self._epochs[epoch] = kept
        return kept


class _Window(NamedTuple):
    epoch: int
    window: int
    samples: Samples


class _Epoch(NamedTuple):
    """An epoch's permuted shards and the rotation of their list of samples.

    Attributes:
        permuted: Shard numbers in the order of this epoch, shape [shards].
        begins: Where each of them begins in the list, and the list's end, shape [shards + 1].
        shifts: What to add to a place in the list to get the sample's number, shape [shards].
        offset: Place in the list that the rotated list begins with.
    """

    permuted: NDArray[np.int64]
    begins: Samples
    shifts: Samples
    offset: int

    @classmethod
    def of(cls, starts: Samples, seed: int, epoch: int) -> "_Epoch":
        permuted = _permutation(len(starts) - 1, _hash(_SHARDS, seed, epoch))
        begins = np.concatenate([[0], np.cumsum(np.diff(starts)[permuted])])
        offset = (_hash(_ROTATION, seed, epoch) * int(starts[-1])) >> 64
        return cls(permuted, begins, starts[permuted] - begins[:-1], offset)

    def samples(self, low: int, high: int) -> Samples:
        places = (np.arange(low, high, dtype=np.int64) + self.offset) % int(self.begins[-1])
        which = np.searchsorted(self.begins, places, side="right") - 1
        found: Samples = places + self.shifts[which]
        return found

    def shards(self, low: int, high: int) -> list[int]:
        """Shard numbers of a stretch of the rotated list, in its order."""
        total = int(self.begins[-1])
        first, last = low + self.offset, high + self.offset
        pieces = [(first, min(last, total)), (max(first - total, 0), last - total)]
        return [
            int(shard)
            for begin, end in pieces
            if begin < end
            for shard in self.permuted[self._which(begin) : self._which(end - 1) + 1]
        ]

    def _which(self, place: int) -> int:
        return int(np.searchsorted(self.begins, place, side="right")) - 1


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """The 64-bit seed of everything random about one sample in one epoch."""
    return _hash(_AUGMENTATION, seed, epoch, sample)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """How many whole global batches an epoch has.

    The samples left over at the end of an epoch, fewer than a batch, are dropped; the next
    epoch's order leaves out others.

    Raises:
        DatasetError: There are fewer samples than one batch takes.
    """
    if num_samples < batch_size:
        raise DatasetError(
            f"a global batch of {batch_size} does not fit a dataset of {num_samples} samples; "
            f"use a batch of at most {num_samples} or a larger dataset"
        )
    return num_samples // batch_size


def position_at(step: int, *, num_samples: int, batch_size: int, seed: int) -> Position:
    """Where training stands after `step` global batches since its start.

    Raises:
        DatasetError: There are fewer samples than one batch takes.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, batch_size))
    return Position(seed=seed, epoch=epoch, step=step_in_epoch)


def rank_rows(batch_size: int, lanes: int, *, rank: int, world: int) -> tuple[int, int]:
    """Which rows of a global batch a rank takes: whole lanes, so that ranks read other shards.

    Args:
        batch_size: Samples of all ranks together.
        lanes: As of `SampleOrder`.
        rank: This rank, from 0.
        world: Number of ranks.

    Returns:
        The first row and how many.

    Raises:
        RunError: The lanes do not divide the batch, or the ranks cannot share the lanes evenly.
    """
    _check_lanes(batch_size, lanes)
    if lanes % world:
        batch = "" if batch_size % world == 0 else f", and train.batch_size to one of {world}"
        raise RunError(
            f"parallel.num_workers must divide data.order.lanes, got {world} and {lanes}; set it "
            f"to {_divisors(lanes)}, or data.order.lanes to a multiple of {world} that divides "
            f"train.batch_size ({batch_size}){batch}"
        )
    count = batch_size // world
    return rank * count, count


def _check_lanes(batch_size: int, lanes: int) -> None:
    if lanes < 1 or batch_size % lanes:
        raise RunError(
            f"data.order.lanes must divide train.batch_size, got {lanes} and {batch_size}; set it "
            f"to {_divisors(batch_size)}, or to 0 (automatic)"
        )


def _divisors(number: int) -> str:
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]] if divisors[1:] else divisors)


def _once(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


def _permutation(count: int, base: int) -> NDArray[np.int64]:
    """0 .. count - 1 in the order of their hashes, shape [count]; count is below 2^32.

    Hashes of the numbers are sorted with the number itself in their low bits: ties are broken
    by number and no two words are equal, so every sorting algorithm gives the same order.
    """
    low_bits = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    numbers = np.arange(count, dtype=np.uint64)
    words = mix64(numbers * np.uint64(GOLDEN_GAMMA) + np.uint64(base))
    words = (words & ~low_bits) | numbers
    words.sort()
    return (words & low_bits).view(np.int64)


def _hash(*words: int) -> int:
    state = 0
    for word in words:
        state = mix64(((state ^ (word & WORD_MASK)) + GOLDEN_GAMMA) & WORD_MASK)
    return state
