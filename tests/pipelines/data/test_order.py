"""The order of samples: every sample once, the same on any number of ranks, for ever."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.order import (
    Position,
    SampleOrder,
    mix64,
    position_at,
    rank_rows,
    sample_seed,
    steps_per_epoch,
)
from pipelines.errors import DatasetError, RunError

GOLDEN = (
    [[8, 10, 5, 0], [9, 4, 6, 1]],
    [2, 3, 7],
    [[5, 6, 3, 7], [0, 1, 2, 8]],
    [9, 10, 4],
)


def order_of(shard_samples, *, batch_size=4, lanes=2, window=3, seed=0):
    return SampleOrder(
        shard_samples=tuple(shard_samples),
        batch_size=batch_size,
        lanes=lanes,
        window=window,
        seed=seed,
    )


def epoch_of(order, epoch):
    """All global batches of an epoch, shape [steps, batch_size]."""
    steps = range(order.steps_per_epoch)
    return np.stack([order.rows(epoch, step, 0, order.batch_size) for step in steps])


@st.composite
def orders(draw):
    """Orders with shards of unequal sizes, and lanes that divide the batch."""
    lanes = draw(st.integers(1, 6))
    batch_size = lanes * draw(st.integers(1, 4))
    shard_samples = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    shard_samples.append(batch_size)  # at least one batch
    window, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**40))
    return order_of(shard_samples, batch_size=batch_size, lanes=lanes, window=window, seed=seed)


# What an epoch is


@settings(max_examples=200, deadline=None)
@given(order=orders(), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_sample_once_but_for_the_declared_dropped_ones(order, epoch):
    dropped = order.dropped(epoch)
    samples = np.concatenate([epoch_of(order, epoch).ravel(), dropped])

    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(order.num_samples))
    assert len(dropped) < order.batch_size


@settings(max_examples=200, deadline=None)
@given(order=orders(), epoch=st.integers(0, 50), data=st.data())
def test_any_split_of_a_batch_gives_its_rows(order, epoch, data):
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, order.batch_size), max_size=4)))
    whole = order.rows(epoch, step, 0, order.batch_size)

    edges = [0, *cuts, order.batch_size]
    parts = [order.rows(epoch, step, a, b - a) for a, b in pairwise(edges)]

    assert np.array_equal(np.concatenate(parts), whole)


@settings(max_examples=100, deadline=None)
@given(order=orders(), first=st.integers(-50, 50), count=st.integers(0, 50))
def test_rows_are_counted_modulo_the_batch(order, first, count):
    whole = order.rows(1, 0, 0, order.batch_size)

    rows = order.rows(1, 0, first, count)

    assert np.array_equal(rows, whole[np.arange(first, first + count) % order.batch_size])


@settings(max_examples=100, deadline=None)
@given(order=orders(), epoch=st.integers(0, 50))
def test_a_batch_takes_equally_many_of_every_lane_and_a_lane_its_windows_in_turn(order, epoch):
    """Against the definition, spelled out with the whole list in memory."""
    each, steps = order.batch_size // order.lanes, order.steps_per_epoch
    unshuffled = order_of(
        order.shard_samples,
        batch_size=order.batch_size,
        lanes=order.lanes,
        window=1,
        seed=order.seed,
    )
    plain = epoch_of(unshuffled, epoch).reshape(steps, order.lanes, each).swapaxes(0, 1)
    lanes = epoch_of(order, epoch).reshape(steps, order.lanes, each).swapaxes(0, 1)

    for mine, straight in zip(
        lanes.reshape(order.lanes, -1), plain.reshape(order.lanes, -1), strict=True
    ):
        for start in range(0, len(mine), order.window):
            window = slice(start, start + order.window)
            assert sorted(mine[window]) == sorted(straight[window])


def test_without_windows_an_epoch_is_permuted_shards_one_after_the_other_rotated():
    order = order_of([5, 5, 5, 5], batch_size=1, lanes=1, window=1)

    for epoch in range(20):
        samples = epoch_of(order, epoch).ravel()
        jumps = np.diff(np.append(samples, samples[0])) != 1
        assert sorted(samples) == list(range(20))
        assert 1 <= jumps.sum() <= 4  # at most one behind each shard, around the circle


@settings(max_examples=100, deadline=None)
@given(order=orders(), epoch=st.integers(0, 50), data=st.data())
def test_the_shards_ahead_hold_what_is_read_in_this_window_and_the_next(order, epoch, data):
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    first = data.draw(st.integers(0, order.batch_size - 1))
    count = data.draw(st.integers(1, order.batch_size - first))
    starts = np.cumsum(order.shard_samples)

    ahead = order.shards_ahead(epoch, step, first, count)

    assert len(set(ahead)) == len(ahead)
    each = order.batch_size // order.lanes
    behind = (order.window_of(step) + 2) * order.window  # places of a lane, from its begin
    for later in range(step, min(behind // each, order.steps_per_epoch)):
        samples = order.rows(epoch, later, first, count)
        assert set(np.searchsorted(starts, samples, side="right")) <= set(ahead)


def test_the_shards_ahead_at_the_end_of_an_epoch_are_those_of_the_next():
    order = order_of([10] * 20, batch_size=4, lanes=2, window=10)

    ahead = order.shards_ahead(6, order.steps_per_epoch - 1, 0, 4)

    assert set(order.shards_in(7, 0, 0, 4)) <= set(ahead)


@given(
    shards=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    lanes=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(1, 30),
    ranks=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_no_more_shards_are_read_at_a_time_than_were_counted_before(shards, lanes, window, ranks):
    world = min(lanes, 4)
    ranks = min(ranks, world)
    order = order_of([*shards, 8], batch_size=8, lanes=lanes, window=window)
    first, count = rank_rows(8, lanes, rank=0, world=world)
    most = order.most_shards(first - 1, count + 1, ranks=ranks)  # with a row of the lane before

    for epoch in range(5):
        for now in range(order.window_of(order.steps_per_epoch - 1) + 1):
            there = {
                shard
                for rank in range(ranks)
                for shard in order.shards_in(epoch, now, rank * count - 1, count + 1)
            }
            assert len(there) <= most


@pytest.mark.parametrize(
    ("shards", "window", "most"),
    [
        ([10] * 90, 1, 8),  # one sample lies in one shard
        ([10] * 90, 11, 16),
        ([10] * 90, 12, 24),
        ([*[10] * 90, 1], 13, 25),  # a last, small one is in one window only
        ([10] * 9, 12, 9),
        ([900], 12, 1),
    ],
)
def test_shards_that_are_read_at_a_time_are_counted_by_windows_and_sizes(shards, window, most):
    order = order_of(shards, batch_size=8, lanes=8, window=window)

    assert order.most_shards(4, 4, ranks=2) == most


# For ever


def test_the_order_is_fixed_for_ever_by_seed_and_epoch():
    """Written down: a change of these numbers breaks the resuming of every run there is."""
    order = order_of([4, 3, 4], batch_size=4, lanes=2, window=3, seed=7)

    assert epoch_of(order, 0).tolist() == GOLDEN[0]
    assert order.dropped(0).tolist() == GOLDEN[1]
    assert epoch_of(order, 2).tolist() == GOLDEN[2]
    assert order.dropped(2).tolist() == GOLDEN[3]
    assert sample_seed(7, 2, 9) == 13130844535564745765


def test_the_scrambler_is_splitmix64_on_integers_and_arrays_alike():
    counters = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # seed 0

    assert mix64(counters).tolist() == published
    assert [mix64(int(counter)) for counter in counters] == published


def test_no_two_epochs_or_seeds_are_alike():
    seen = {
        tuple(epoch_of(order_of([25, 25], seed=s, window=50), e).ravel())
        for s in range(20)
        for e in range(20)
    }

    assert len(seen) == 400


def test_epochs_of_a_single_shard_differ_even_without_windows():
    order = order_of([1000], batch_size=10, lanes=1, window=1)

    assert len({tuple(order.rows(epoch, 0, 0, 10)) for epoch in range(30)}) > 25


def test_going_back_to_an_epoch_gives_it_again():
    """What is kept of an epoch in use never shows in another."""
    order = order_of([9, 14, 8], window=4)
    epochs = [epoch_of(order, epoch) for epoch in range(4)]

    for epoch in (3, 0, 2, 1, 0):
        for step in (2, 0, 5, 1):
            rows = order.rows(epoch, step, 0, 4)
            assert np.array_equal(rows, epochs[epoch][step])


def test_places_are_spread_evenly_over_epochs():
    """Chi-squared of sample x place over 4,000 epochs: 49 degrees of freedom for 8 samples."""
    order = order_of([2, 2, 2, 2], batch_size=8, lanes=1, window=8, seed=1)
    places = np.array([np.argsort(order.rows(e, 0, 0, 8)) for e in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=8) for i in range(8)])

    assert ((counts - 500) ** 2 / 500).sum() < 49 + 4 * np.sqrt(2 * 49)


def test_what_is_dropped_is_spread_evenly_over_epochs():
    order = order_of([5, 5, 5, 5], batch_size=8, lanes=1, window=4)
    counts = np.zeros(20)
    for epoch in range(3000):
        counts[order.dropped(epoch)] += 1

    assert ((counts - 600) ** 2 / 600).sum() < 19 + 6 * np.sqrt(2 * 19)


def test_a_samples_seed_says_nothing_about_its_place():
    order = order_of([4000], batch_size=4000, lanes=1, window=4000, seed=1)
    samples = order.rows(0, 0, 0, 4000)
    seeds = np.array([sample_seed(1, 0, int(i)) / 2**64 for i in samples])

    assert abs(np.corrcoef(seeds, np.arange(4000))[0, 1]) < 4 / np.sqrt(4000)


def test_every_sample_epoch_and_seed_has_a_seed_of_its_own():
    seeds = [sample_seed(s, e, i) for s in range(10) for e in range(10) for i in range(100)]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_any_place_of_a_large_dataset_is_found_at_once():
    """14 million samples in 3,500 shards: no list of them all is ever made."""
    order = SampleOrder(
        shard_samples=np.full(3500, 4000), batch_size=4096, lanes=256, window=4096, seed=5
    )
    start = time.process_time()

    rows = [order.rows(epoch, step, 0, 4096) for epoch, step in ((0, 0), (90, 3416), (3, 17))]

    assert time.process_time() - start < 2  # some 0.15 s
    assert [len(set(each.tolist())) for each in rows] == [4096] * 3


# Ranks and positions


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_ranks_together_read_the_same_global_batch_whatever_the_world(world):
    order = order_of([17, 20, 13], batch_size=24, lanes=12)

    for step in range(order.steps_per_epoch):
        parts = []
        for rank in range(world):
            first, count = rank_rows(24, 12, rank=rank, world=world)
            assert count == 24 // world
            parts.append(order.rows(0, step, first, count))
        assert np.array_equal(np.concatenate(parts), order.rows(0, step, 0, 24))


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


def test_lanes_that_do_not_divide_the_batch_are_told_which_do():
    expected = (
        r"data\.order\.lanes must divide train\.batch_size, got 4 and 10; set it to 1, 2, 5 or 10, "
        r"or to 0 \(automatic\)"
    )
    with pytest.raises(RunError, match=expected):
        order_of([50], batch_size=10, lanes=4)
    with pytest.raises(RunError, match=expected):
        rank_rows(10, 4, rank=0, world=1)


def test_a_world_that_does_not_divide_the_lanes_is_told_which_do():
    with pytest.raises(
        RunError,
        match=r"parallel\.num_workers must divide data\.order\.lanes, got 3 and 4; set it to "
        r"1, 2 or 4, or data\.order\.lanes to a multiple of 3 that divides train\.batch_size "
        r"\(12\)$",
    ):
        rank_rows(12, 4, rank=0, world=3)
    with pytest.raises(
        RunError,
        match=r"got 3 and 1; set it to 1, or data\.order\.lanes to a multiple of 3 that "
        r"divides train\.batch_size \(8\), and train\.batch_size to one of 3",
    ):
        rank_rows(8, 1, rank=0, world=3)


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(
        DatasetError,
        match="global batch of 64 does not fit a dataset of 50 samples; use a batch of at most 50",
    ):
        steps_per_epoch(50, 64)
    with pytest.raises(DatasetError, match="global batch of 64 does not fit a dataset of 50"):
        order_of([20, 30], batch_size=64)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_that_an_epoch_does_not_have_has_no_rows(step):
    with pytest.raises(ValueError, match=f"step {step} of an epoch of 2"):
        order_of([4, 3, 4]).rows(0, step, 0, 4)
