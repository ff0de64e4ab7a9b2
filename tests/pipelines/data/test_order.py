"""The order of samples: every sample once, the same on any number of ranks, for ever."""

import numpy as np
import pytest

from pipelines.data.order import (
    Position,
    batch_samples,
    epoch_order,
    mix64,
    position_at,
    rank_batch_size,
    sample_seed,
    steps_per_epoch,
)
from pipelines.errors import DatasetError, RunError


@pytest.mark.parametrize("num_samples", [1, 2, 3, 64, 65, 1000, (1 << 16) + 1])
def test_an_epoch_holds_every_sample_exactly_once(num_samples):
    samples = epoch_order(num_samples, seed=3, epoch=1)

    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(num_samples))


def test_the_order_is_fixed_for_ever_by_seed_and_epoch():
    """Written down: a change of these numbers breaks the resuming of every run there is."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [7, 2, 8, 4, 5, 9, 3, 1, 6, 0]
    assert epoch_order(10, seed=7, epoch=2).tolist() == [9, 6, 2, 5, 1, 0, 3, 4, 8, 7]
    assert sample_seed(7, 2, 9) == 13130844535564745765


def test_the_scrambler_is_splitmix64_on_integers_and_arrays_alike():
    counters = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # seed 0

    assert mix64(counters).tolist() == published
    assert [mix64(int(counter)) for counter in counters] == published


def test_a_slow_sort_by_hash_gives_the_same_order():
    """The reference: hashes without their low bits, equal ones by index."""
    from_hashes = sorted(range(500), key=lambda i: (_hash_of(i, seed=5, epoch=4) >> 9, i))

    assert epoch_order(500, seed=5, epoch=4).tolist() == from_hashes


def test_no_two_epochs_or_seeds_are_alike():
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(20) for e in range(20)}

    assert len(orders) == 400


def test_places_are_spread_evenly_over_epochs():
    """Chi-squared of sample x place over 4,000 epochs: 49 degrees of freedom for 8 samples."""
    places = np.array([np.argsort(epoch_order(8, seed=1, epoch=e)) for e in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=8) for i in range(8)])

    assert ((counts - 500) ** 2 / 500).sum() < 49 + 4 * np.sqrt(2 * 49)


def test_a_samples_seed_says_nothing_about_its_place():
    samples = epoch_order(4000, seed=1, epoch=0)
    seeds = np.array([sample_seed(1, 0, int(i)) / 2**64 for i in samples])

    assert abs(np.corrcoef(seeds, np.arange(4000))[0, 1]) < 4 / np.sqrt(4000)


def test_every_sample_epoch_and_seed_has_a_seed_of_its_own():
    seeds = [sample_seed(s, e, i) for s in range(10) for e in range(10) for i in range(100)]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_ranks_together_read_the_same_global_batch_whatever_the_world(world):
    samples = epoch_order(30, seed=0, epoch=0)

    for step in range(steps_per_epoch(30, 12)):
        parts = [
            batch_samples(samples, step, batch_size=12, rank=rank, world=world)
            for rank in range(world)
        ]
        assert {len(part) for part in parts} == {12 // world}
        assert np.array_equal(np.concatenate(parts), samples[step * 12 : step * 12 + 12])


def test_a_partial_batch_at_the_end_of_an_epoch_is_dropped():
    assert steps_per_epoch(30, 12) == 2
    assert steps_per_epoch(24, 12) == 2
    assert steps_per_epoch(12, 12) == 1


def test_positions_count_steps_through_the_epochs():
    position = position_at(0, num_samples=30, batch_size=10, seed=4)
    assert position == Position(seed=4, epoch=0, step=0)

    for step in range(1, 10):
        position = position.after(steps_per_epoch=3)
        assert position == position_at(step, num_samples=30, batch_size=10, seed=4)
    assert position == Position(seed=4, epoch=3, step=0)


def test_a_world_that_does_not_divide_the_batch_is_told_which_do():
    with pytest.raises(
        RunError,
        match="global batch of 10 cannot be shared evenly by 4 ranks; use 1, 2, 5, 10 ranks or a "
        "batch that is a multiple of 4",
    ):
        rank_batch_size(10, 4)
    with pytest.raises(RunError, match="batch of 9 cannot be shared evenly by 2 ranks"):
        batch_samples(np.arange(9), 0, batch_size=9, rank=0, world=2)


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(
        DatasetError,
        match="global batch of 64 does not fit a dataset of 50 samples; use a batch of at most 50",
    ):
        steps_per_epoch(50, 64)


def _hash_of(index, *, seed, epoch):
    state = 0
    for word in (1, seed, epoch):
        state = mix64(((state ^ word) + 0x9E3779B97F4A7C15) % 2**64)
    return mix64((state + index * 0x9E3779B97F4A7C15) % 2**64)
