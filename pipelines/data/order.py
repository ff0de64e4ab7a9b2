"""Which sample comes when: integers in, integers out.

The order of an epoch is a pure function of (seed, epoch, number of samples). Ranks take
contiguous slices of one global batch, so the same samples make up a step however many ranks
share it, and resuming is arithmetic: a `Position` is three integers. Nothing here opens a
file (see `stream`) or draws a crop (see `transforms`, which takes its seeds from here).

Randomness is splitmix64's finaliser (Steele, Lea and Flood 2014) over counters, written out
here: the streams of library generators may change between versions, and a resumed run must
see the same samples years later on another machine. Different purposes hash with different
first words, so a sample's place in the epoch says nothing about its crop.
"""

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DatasetError, RunError

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
WORD_MASK = (1 << 64) - 1
_ORDER, _AUGMENTATION = 1, 2
# Counters are hashed in pieces that stay in the processor's cache: 3x faster at 14 million.
_CHUNK = 1 << 16


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


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample indices of one epoch in the order in which they are read.

    Hashes of the indices are sorted with the index itself in their low bits: ties are broken
    by index and no two words are equal, so every sorting algorithm gives the same order.

    Args:
        num_samples: Samples in the dataset, below 2^32.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        A permutation of 0 .. num_samples - 1, shape [num_samples].
    """
    base = _hash(_ORDER, seed, epoch)
    index_mask = (1 << (num_samples - 1).bit_length()) - 1
    words = np.empty(num_samples, np.uint64)
    for start in range(0, num_samples, _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, num_samples), dtype=np.uint64)
        hashes = mix64(indices * np.uint64(GOLDEN_GAMMA) + np.uint64(base))
        words[start : start + _CHUNK] = (hashes & np.uint64(WORD_MASK ^ index_mask)) | indices
    words.sort()
    words &= np.uint64(index_mask)
    return words.view(np.int64)


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


def rank_batch_size(batch_size: int, world: int) -> int:
    """How many samples of a global batch each of `world` ranks takes.

    Raises:
        RunError: The ranks cannot share the batch evenly.
    """
    if batch_size % world:
        divisors = [str(d) for d in range(1, batch_size + 1) if batch_size % d == 0]
        raise RunError(
            f"a global batch of {batch_size} cannot be shared evenly by {world} ranks; use "
            f"{', '.join(divisors)} ranks or a batch that is a multiple of {world}"
        )
    return batch_size // world


def batch_samples(
    order: NDArray[np.int64], step_in_epoch: int, *, batch_size: int, rank: int, world: int
) -> NDArray[np.int64]:
    """The samples that one rank reads for one step: its contiguous slice of the global batch.

    Args:
        order: The epoch's order, shape [num_samples].
        step_in_epoch: Step, from 0, below `steps_per_epoch`.
        batch_size: Samples of all ranks together.
        rank: This rank, from 0.
        world: Number of ranks.

    Returns:
        Sample indices, shape [batch_size / world]; concatenated over the ranks they are the
        global batch, whatever the world.

    Raises:
        RunError: The ranks cannot share the batch evenly.
    """
    local = rank_batch_size(batch_size, world)
    start = step_in_epoch * batch_size + rank * local
    return order[start : start + local]


def _hash(*words: int) -> int:
    state = 0
    for word in words:
        state = mix64(((state ^ (word & WORD_MASK)) + GOLDEN_GAMMA) & WORD_MASK)
    return state
