"""Batches: what is in them depends on (seed, epoch, sample), never on who made them."""

import json
import threading
import time
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.manifest import INDEX, INDEX_SCHEMA, MANIFEST, read_index, write_index
from pipelines.data.order import Position, position_at
from pipelines.data.stream import EvalStream, ShardReader, TrainStream
from pipelines.errors import DatasetError, RunError

START = Position(seed=3, epoch=0, step=0)


@pytest.fixture
def files(noise, encode):
    """26 images of different sizes."""
    return [encode(noise(20 + i, 40 - i, seed=i)) for i in range(26)]


@pytest.fixture
def folder(make_dataset, files):
    return make_dataset(files)


def open_train(folder, **changes):
    settings = {
        "image_size": 16,
        "batch_size": 8,
        "seed": 3,
        "rank": 0,
        "world": 1,
        "crop_area": (0.05, 1.0),
        "crop_ratio": (0.75, 4 / 3),
        "flip": 0.5,
        "threads": 2,
    }
    return TrainStream(folder, **settings | changes)


def open_eval(folder, **changes):
    settings = {
        "image_size": 16,
        "resize": 18,
        "batch_size": 8,
        "rank": 0,
        "world": 1,
        "threads": 2,
    }
    return EvalStream(folder, **settings | changes)


def take(folder, count, start=START, **changes):
    batches = open_train(folder, **changes).batches(start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def same(left, right):
    return (
        torch.equal(left.pixels_BHWC, right.pixels_BHWC)
        and torch.equal(left.labels_B, right.labels_B)
        and torch.equal(left.valid_B, right.valid_B)
    )


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


# Reading


def test_the_reader_finds_every_samples_bytes_key_and_label(folder, files):
    reader = ShardReader(folder)

    assert reader.num_samples == 26
    assert reader.num_classes == 26
    assert [reader.sample(i) for i in range(26)] == [
        (f"key_{i}", data, i) for i, data in enumerate(files)
    ]
    assert reader.path_of(11) == folder / "shard-000002.tar"


def test_a_closed_reader_holds_no_file_and_opens_again(folder, files):
    reader = ShardReader(folder)
    reader.sample(7)
    reader.close()

    assert reader.sample(7)[1] == files[7]


def test_threads_may_share_a_reader(folder, files):
    reader, wrong = ShardReader(folder), []

    def read():
        wrong.extend(i for i in range(26) if reader.sample(i)[1] != files[i])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_is_refused_by_name(folder, change):
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)

    with pytest.raises(
        DatasetError,
        match=rf"shard .*shard-000001\.tar has {size + change} bytes, manifest\.json says {size}; "
        r"`mone verify .*train` lists what was changed",
    ):
        ShardReader(folder)


def test_a_missing_shard_is_refused_by_name(folder):
    (folder / "shard-000003.tar").unlink()

    with pytest.raises(DatasetError, match=r"shard .*shard-000003\.tar is missing; `mone verify"):
        ShardReader(folder)


def test_an_index_of_fewer_samples_than_the_manifest_is_refused(folder):
    write_index(folder, read_index(folder).slice(0, 24))

    with pytest.raises(
        DatasetError,
        match=rf"{INDEX} lists 4 samples of shard-000004\.tar, {MANIFEST} says 5; `mone verify",
    ):
        ShardReader(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [("shard", 6), ("shard", -1), ("label", 26), ("jpg_offset", 1 << 40), ("jpg_size", -1)],
)
def test_an_index_that_points_outside_is_refused(folder, column, value):
    rows = read_index(folder).to_pylist()
    rows[9][column] = value
    write_index(folder, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))

    with pytest.raises(
        DatasetError, match="places sample 'key_9' outside its shard or its 26 classes"
    ):
        ShardReader(folder)


# Training


def test_training_batches_have_one_shape_and_an_epoch_no_sample_twice(folder):
    stream = open_train(folder)
    assert (stream.num_samples, stream.num_classes, stream.steps_per_epoch) == (26, 26, 3)

    batches = [batch for batch, _ in take(folder, 7)]

    for batch in batches:
        assert batch.pixels_BHWC.shape == (8, 16, 16, 3)
        assert batch.pixels_BHWC.dtype == torch.uint8
        assert batch.labels_B.dtype == torch.int64
        assert batch.valid_B.tolist() == [True] * 8
    for epoch in (batches[:3], batches[3:6]):
        assert len(set(torch.cat([batch.labels_B for batch in epoch]).tolist())) == 24


def test_a_sample_is_augmented_anew_in_every_epoch(make_dataset, noise, encode):
    one = make_dataset([encode(noise(40, 40))])

    pixels = [batch.pixels_BHWC for batch, _ in take(one, 6, batch_size=1)]

    assert not any(torch.equal(a, b) for a, b in pairwise(pixels))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_and_threads_make_the_same_global_batches_to_the_bit(folder, world, threads):
    expected = take(folder, 5)

    ranks = [take(folder, 5, rank=r, world=world, threads=threads) for r in range(world)]

    for step, (batch, position) in enumerate(expected):
        parts = [rank[step] for rank in ranks]
        assert {part[1] for part in parts} == {position}
        assert torch.equal(torch.cat([p[0].pixels_BHWC for p in parts]), batch.pixels_BHWC)
        assert torch.equal(torch.cat([p[0].labels_B for p in parts]), batch.labels_B)


@pytest.mark.parametrize(("world", "threads"), [(1, 2), (1, 3), (2, 1), (4, 2)])
def test_resuming_at_any_step_on_any_ranks_gives_the_rest_to_the_bit(folder, world, threads):
    unbroken = take(folder, 8)

    for step, (_, position) in enumerate(unbroken[:-1]):
        assert position == position_at(step + 1, num_samples=26, batch_size=8, seed=3)
        ranks = [
            take(folder, 1, start=position, rank=rank, world=world, threads=threads)
            for rank in range(world)
        ]
        expected, after = unbroken[step + 1]
        assert {rank[0][1] for rank in ranks} == {after}
        pixels = torch.cat([rank[0][0].pixels_BHWC for rank in ranks])
        assert torch.equal(pixels, expected.pixels_BHWC)


def test_another_seed_gives_other_batches(folder):
    (batch, _) = take(folder, 1)[0]
    (other, _) = take(folder, 1, seed=4, start=Position(seed=4, epoch=0, step=0))[0]

    assert not same(batch, other)


def test_closing_the_iterator_ends_its_threads(folder):
    batches = open_train(folder, threads=3).batches(START)
    next(batches)
    assert decode_threads()

    batches.close()

    assert not decode_threads()


def test_no_more_than_one_batch_is_made_ahead(folder, monkeypatch):
    read = []
    sample = ShardReader.sample
    monkeypatch.setattr(ShardReader, "sample", lambda self, i: read.append(i) or sample(self, i))
    batches = open_train(folder, threads=1).batches(START)

    next(batches)
    next(batches)
    deadline = time.monotonic() + 20
    while len(read) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # long enough for the threads to go too far, if they would

    assert len(read) == 24
    batches.close()


def test_a_sample_that_does_not_decode_names_shard_and_key(make_dataset, files):
    broken = make_dataset([*files[:7], files[7][:300], *files[8:]])

    with pytest.raises(
        DatasetError,
        match=r"sample 'key_7' in .*shard-000001\.tar: does not decode as an image: .*; "
        "`mone verify",
    ):
        take(broken, 4)
    with pytest.raises(DatasetError, match="sample 'key_7' in"):
        list(open_eval(broken))
    assert not decode_threads()


def test_a_position_of_another_seed_is_refused(folder):
    with pytest.raises(
        RunError, match=r"made with seed 3, but the run has seed 9; set train\.seed to 3 or start"
    ):
        open_train(folder, seed=9).batches(START)


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (2, -1), (-1, 0)])
def test_a_position_outside_the_epoch_is_refused(folder, epoch, step):
    with pytest.raises(
        RunError,
        match=f"step {step} of epoch {epoch}, but an epoch has 3 steps of 8 samples here; resume",
    ):
        open_train(folder).batches(Position(seed=3, epoch=epoch, step=step))


def test_a_batch_that_does_not_fit_ranks_or_dataset_is_refused(folder):
    with pytest.raises(RunError, match="batch of 8 cannot be shared evenly by 3 ranks"):
        open_train(folder, world=3)
    with pytest.raises(DatasetError, match="batch of 32 does not fit a dataset of 26 samples"):
        open_train(folder, batch_size=32)


def test_a_position_survives_json(folder):
    from_json = Position(**json.loads('{"seed": 3, "epoch": 0, "step": 1}'))

    assert same(take(folder, 1, start=from_json)[0][0], take(folder, 2)[1][0])


# Evaluation


@pytest.mark.parametrize(
    ("batch_size", "world"), [(8, 1), (26, 1), (30, 1), (4, 2), (5, 3), (13, 2), (7, 4), (1, 5)]
)
def test_evaluation_covers_every_sample_once_in_equally_many_batches(folder, batch_size, world):
    streams = [open_eval(folder, batch_size=batch_size, rank=r, world=world) for r in range(world)]
    batches = [list(stream) for stream in streams]

    assert {len(rank) for rank in batches} == {len(stream) for stream in streams}
    assert len({len(rank) for rank in batches}) == 1
    seen = []
    for batch in (batch for rank in batches for batch in rank):
        assert batch.pixels_BHWC.shape == (batch_size, 16, 16, 3)
        assert batch.labels_B.shape == batch.valid_B.shape == (batch_size,)
        seen += batch.labels_B[batch.valid_B].tolist()
        assert not batch.pixels_BHWC[~batch.valid_B].any()
        assert not batch.labels_B[~batch.valid_B].any()
    assert sorted(seen) == list(range(26))
    assert streams[0].num_samples == 26
    assert streams[0].num_classes == 26


def test_evaluation_repeats_itself_whatever_the_threads(folder):
    stream = open_eval(folder, threads=3)

    first, second, alone = list(stream), list(stream), list(open_eval(folder, threads=1))

    assert len(first) == 4
    assert all(same(a, b) and same(a, c) for a, b, c in zip(first, second, alone, strict=True))
    assert not decode_threads()


def test_evaluation_pixels_are_the_images_own_when_sizes_agree(make_dataset, noise, encode):
    images = [noise(16, 16, seed=i) for i in range(5)]
    stream = open_eval(make_dataset([encode(image, "PNG") for image in images]), resize=16)

    (batch,) = list(stream)

    assert np.array_equal(batch.pixels_BHWC[:5].numpy(), np.stack([np.asarray(i) for i in images]))


def test_evaluation_left_early_ends_its_threads(folder):
    batches = iter(open_eval(folder, batch_size=2))
    next(batches)

    batches.close()

    assert not decode_threads()


def test_a_centre_larger_than_the_scaled_image_is_refused(folder):
    with pytest.raises(
        RunError, match=r"short side of 12 pixels hold no centre of 16; set data\.eval_resize to 16"
    ):
        open_eval(folder, resize=12)


def test_closed_streams_can_be_read_again(folder):
    stream = open_eval(folder)
    first = list(stream)
    stream.close()

    assert all(same(a, b) for a, b in zip(first, stream, strict=True))
    train = open_train(folder)
    train.close()
    assert same(next(train.batches(START))[0], take(folder, 1)[0][0])
