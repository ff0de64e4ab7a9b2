"""Batches: what is in them depends on (seed, epoch, sample), never on who made them."""

import json
import shutil
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from pipelines.data.manifest import SourceRecord, read_manifest, write_manifest
from pipelines.data.order import Position
from pipelines.data.pixels.mixup import mixing_weights
from pipelines.data.settings import AugmentConfig, OrderConfig, ReadConfig
from pipelines.errors import DatasetError, RunError
from pipelines.storage import place
from tests.pipelines.data.streams import (
    SEED,
    START,
    open_eval,
    open_train,
    same,
    take,
    working_threads,
)

BROKEN = b"not an image"


@pytest.fixture
def files(noise, encode):
    """26 images of different sizes."""
    return [encode(noise(20 + i, 40 - i, seed=i)) for i in range(26)]


@pytest.fixture
def folder(make_dataset, files):
    return make_dataset(files)


# Training


def test_training_batches_have_one_shape_and_an_epoch_no_sample_twice(folder):
    stream = open_train(folder)
    assert (stream.num_samples, stream.num_classes, stream.steps_per_epoch) == (26, 26, 3)

    batches = [batch for batch, _ in take(folder, 7)]

    for batch in batches:
        assert batch.pixels_RTHWC.shape == (8, 1, 16, 16, 3)
        assert batch.pixels_RTHWC.dtype == torch.uint8
        assert batch.labels_R.dtype == torch.int64
        assert batch.valid_B.tolist() == [True] * 8
        assert batch.mix_BM is None
    for epoch in (batches[:3], batches[3:6]):
        assert len(set(torch.cat([batch.labels_R for batch in epoch]).tolist())) == 24


def test_every_batch_has_equally_many_samples_of_every_part_of_the_dataset(make_dataset, files):
    """Without a shuffle a lane is a stretch of shards, and a batch has one sample of each."""
    folder = make_dataset(files[:24], per_shard=1)
    in_order = open_train(folder, order=OrderConfig(window=1)).batches(START)

    lanes = torch.stack([batch.labels_R for batch, _ in islice(in_order, 3)], dim=1)
    mixed = torch.stack([batch.labels_R for batch, _ in take(folder, 3)], dim=1)

    assert lanes.sort(dim=1).values.tolist() == mixed.sort(dim=1).values.tolist()
    in_order.close()


def test_a_sample_is_augmented_anew_in_every_epoch(make_dataset, noise, encode):
    one = make_dataset([encode(noise(40, 40))])

    pixels = [batch.pixels_RTHWC for batch, _ in take(one, 6, batch_size=1)]

    assert not any(torch.equal(a, b) for a, b in pairwise(pixels))


def test_another_seed_gives_other_batches(folder):
    (batch, _) = take(folder, 1)[0]
    (other, _) = take(folder, 1, seed=4, start=Position(seed=4, epoch=0, step=0))[0]

    assert not same(batch, other)


def test_closing_the_iterator_ends_its_threads(folder):
    batches = open_train(folder, read=ReadConfig(threads=3)).batches(START)
    next(batches)
    assert working_threads()

    batches.close()

    assert not working_threads()


def test_a_bad_sample_ends_the_stream_by_name_and_its_threads(make_dataset, files):
    files[7] = files[7][:300]
    broken = make_dataset(files)
    named = (
        r"sample 'key_7' in .*shard-000001\.tar: does not decode as an image: .*; `mone verify .*"
        r"train` lists what was changed; restore it or make the shards again, or set "
        r"data\.read\.on_corrupt to skip"
    )

    with pytest.raises(DatasetError, match=named):
        take(broken, 4)
    with pytest.raises(DatasetError, match=named):
        list(open_eval(broken))
    assert not working_threads()


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
        open_train(folder).batches(Position(seed=SEED, epoch=epoch, step=step))


def test_a_batch_that_does_not_fit_ranks_lanes_or_dataset_is_refused(folder):
    with pytest.raises(RunError, match=r"num_workers must divide data\.order\.lanes, got 3 and 8"):
        open_train(folder, world=3)
    with pytest.raises(RunError, match=r"lanes must divide train\.batch_size, got 3 and 8"):
        open_train(folder, order=OrderConfig(lanes=3))
    with pytest.raises(DatasetError, match="batch of 32 does not fit a dataset of 26 samples"):
        open_train(folder, batch_size=32)


def test_a_position_survives_json(folder):
    from_json = Position(**json.loads('{"seed": 3, "epoch": 0, "step": 1}'))

    assert same(take(folder, 1, start=from_json)[0][0], take(folder, 2)[1][0])


# Mixup


@pytest.mark.parametrize("images", [2, 3])
def test_with_mixup_the_rows_before_the_ranks_first_come_first(folder, images):
    augment = AugmentConfig(mixup=0.5, mixup_images=images)
    plain = [batch for batch, _ in take(folder, 4)]
    extra = images - 1

    for step, (batch, position) in enumerate(take(folder, 4, rank=1, world=2, augment=augment)):
        assert batch.samples == 4
        assert batch.pixels_RTHWC.shape == (4 + extra, 1, 16, 16, 3)
        assert torch.equal(batch.pixels_RTHWC, plain[step].pixels_RTHWC[4 - extra :])
        assert torch.equal(batch.labels_R, plain[step].labels_R[4 - extra :])
        assert batch.mix_BM.shape == (4, images)
        epoch = step // 3
        assert position == Position(seed=SEED, epoch=(step + 1) // 3, step=(step + 1) % 3)
        expected = [
            mixing_weights(augment, SEED, epoch, label) for label in batch.labels_R[extra:].tolist()
        ]
        assert np.array_equal(batch.mix_BM.numpy(), np.stack(expected))


@pytest.mark.parametrize(("batch_size", "images"), [(8, 2), (8, 5), (2, 2), (2, 5), (1, 3)])
def test_the_rows_before_the_first_of_a_global_batch_are_its_last(folder, batch_size, images):
    augment = AugmentConfig(mixup=0.5, mixup_images=images)
    extra = images - 1

    for (plain, _), (batch, _) in zip(
        take(folder, 3, batch_size=batch_size),
        take(folder, 3, batch_size=batch_size, augment=augment),
        strict=True,
    ):
        rows = np.arange(-extra, batch_size) % batch_size
        assert torch.equal(batch.pixels_RTHWC, plain.pixels_RTHWC[rows])
        assert torch.equal(batch.labels_R, plain.labels_R[rows])


# Bad samples that may be skipped

SKIP = ReadConfig(on_corrupt="skip", corrupt_share=1.0)


def test_a_skipped_samples_place_and_label_go_to_the_next(make_dataset, files):
    plain = [batch.labels_R for batch, _ in take(make_dataset(files), 3)]
    files[7] = files[20] = BROKEN
    stream = open_train(make_dataset(files, name="broken"), read=SKIP)
    batches = stream.batches(START)

    found = [batch.labels_R for batch, _ in islice(batches, 3)]

    batches.close()
    wanted = torch.stack(plain)
    expected = torch.where((wanted == 7) | (wanted == 20), wanted + 1, wanted)
    assert torch.equal(torch.stack(found), expected)
    assert stream.skipped == int(((wanted == 7) | (wanted == 20)).sum())
    assert 1 <= len(stream.skipped_samples) <= 2
    assert all("does not decode as an image" in why for why in stream.skipped_samples.values())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("images", [1, 3, 9])
def test_a_skipped_sample_counts_once_and_when_its_batch_is_handed_out(
    make_dataset, files, world, images
):
    augment = AugmentConfig(mixup=0.5, mixup_images=images) if images > 1 else AugmentConfig()
    plain = [batch.labels_R for batch, _ in take(make_dataset(files), 6)]
    bad = plain[2][[1, 3, 4]].tolist()  # 3 and 4 are of different ranks; the one is mixed into both
    expected = np.cumsum([sum(label in bad for label in labels.tolist()) for labels in plain])
    for sample in bad:
        files[sample] = BROKEN
    broken = make_dataset(files, name="broken")
    read = ReadConfig(on_corrupt="skip", corrupt_share=1.0, threads=2, prefetch=3)
    streams = [
        open_train(broken, read=read, augment=augment, rank=rank, world=world)
        for rank in range(world)
    ]

    taken = [islice(stream.batches(START), 6) for stream in streams]
    counted = [sum(s.skipped for s in streams) for _ in zip(*taken, strict=True)]

    assert counted == expected.tolist()
    names = {name.split("'")[1] for stream in streams for name in stream.skipped_samples}
    assert names == {f"key_{sample}" for sample in bad}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_takes_a_place_is_the_same_on_any_ranks_and_threads(make_dataset, files, world):
    files[7] = files[8] = files[20] = BROKEN
    broken = make_dataset(files)
    augment = AugmentConfig(mixup=0.5)
    expected = take(broken, 5, read=SKIP, augment=augment)
    read = ReadConfig(on_corrupt="skip", corrupt_share=1.0, threads=3, prefetch=4)

    for rank in range(world):
        mine = take(broken, 5, read=read, augment=augment, rank=rank, world=world)
        for (part, _), (whole, _) in zip(mine, expected, strict=True):
            size = 8 // world
            rows = slice(rank * size, (rank + 1) * size + 1)
            assert torch.equal(part.pixels_RTHWC, whole.pixels_RTHWC[rows])
            assert torch.equal(part.labels_R, whole.labels_R[rows])


def test_too_many_bad_samples_stop_the_stream(make_dataset, files):
    for bad in (3, 7, 11, 15):
        files[bad] = BROKEN
    read = ReadConfig(on_corrupt="skip", corrupt_share=0.1)

    with pytest.raises(
        DatasetError, match=r"[34] of 24 samples were skipped, more than data\.read\.corrupt_share"
    ):
        take(make_dataset(files), 4, read=read)
    assert not working_threads()


def test_evaluation_leaves_out_what_may_be_skipped(make_dataset, files):
    files[7] = BROKEN
    stream = open_eval(make_dataset(files), read=SKIP)

    batches = list(stream)

    seen = torch.cat([batch.labels_R[batch.valid_B] for batch in batches]).tolist()
    assert seen == [i for i in range(26) if i != 7]
    assert not batches[0].pixels_RTHWC[7].any()
    assert stream.skipped == 1
    (name,) = stream.skipped_samples
    assert name.startswith("sample 'key_7' in ")


@pytest.mark.parametrize(("world", "rank", "bad"), [(1, 0, (0, 1)), (2, 0, (0,)), (2, 1, (8,))])
def test_what_one_evaluation_may_skip_every_one_may(make_dataset, files, world, rank, bad):
    """Two bad samples of 26, the first that are read: as bad a beginning in every evaluation."""
    for sample in bad:
        files[sample] = BROKEN
    read = ReadConfig(on_corrupt="skip", corrupt_share=len(bad) / (26 if world == 1 else 10))
    stream = open_eval(make_dataset(files), read=read, rank=rank, world=world)

    for _ in range(3):
        assert sum(int(batch.valid_B.sum()) for batch in stream) > 0
    assert stream.skipped == 3 * len(bad)


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
        assert batch.pixels_RTHWC.shape == (batch_size, 1, 16, 16, 3)
        assert batch.labels_R.shape == batch.valid_B.shape == (batch_size,)
        assert batch.views == 1
        seen += batch.labels_R[batch.valid_B].tolist()
        assert not batch.pixels_RTHWC[~batch.valid_B].any()
        assert not batch.labels_R[~batch.valid_B].any()
    assert sorted(seen) == list(range(26))
    assert streams[0].num_samples == 26
    assert streams[0].num_classes == 26


def test_evaluation_repeats_itself_whatever_the_threads(folder):
    stream = open_eval(folder, read=ReadConfig(threads=3, prefetch=1))

    first, second = list(stream), list(stream)
    alone = list(open_eval(folder, read=ReadConfig(threads=1, prefetch=5)))

    assert len(first) == 4
    assert all(same(a, b) and same(a, c) for a, b, c in zip(first, second, alone, strict=True))
    assert not working_threads()


def test_evaluation_pixels_are_the_images_own_when_sizes_agree(make_dataset, noise, encode):
    images = [noise(16, 16, seed=i) for i in range(5)]
    stream = open_eval(make_dataset([encode(image, "PNG") for image in images]), resize=16)

    (batch,) = list(stream)

    expected = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(batch.pixels_RTHWC[:5, 0].numpy(), expected)


def test_evaluation_left_early_ends_its_threads(folder):
    batches = iter(open_eval(folder, batch_size=2))
    next(batches)

    batches.close()

    assert not working_threads()


def test_a_centre_larger_than_the_scaled_image_is_refused(folder):
    with pytest.raises(
        RunError, match=r"short side of 12 pixels hold no centre of 16; set data\.eval_resize to 16"
    ):
        open_eval(folder, resize=12)


@pytest.mark.parametrize("open_stream", [open_train, open_eval])
def test_samples_without_labels_are_refused(make_dataset, files, open_stream):
    labels = [-1 if i in (3, 9) else i for i in range(26)]

    with pytest.raises(
        DatasetError,
        match=r"2 of the 26 samples in .*train have no label, which training and scoring need; "
        "use a part of the release that has labels",
    ):
        open_stream(make_dataset(files, labels=labels))


@pytest.mark.parametrize("layouts", [("ssv2",), ("folders", "ssv2")])
def test_where_left_and_right_are_classes_flips_are_refused(folder, layouts):
    """Whatever the recipe: the manifest knows what went in."""
    record = SourceRecord(
        name="archive", layout="", part="all", fingerprint="", version=1, samples_per_shard=5
    )
    sources = tuple(replace(record, layout=layout) for layout in layouts)
    manifest = read_manifest(place(folder))
    write_manifest(place(folder), replace(manifest, sources=sources))

    with pytest.raises(
        DatasetError,
        match=r"data\.augment\.flip is 0\.5, but .*train holds Something-Something-v2, whose "
        r"classes tell left from right; set data\.augment\.flip to 0",
    ):
        open_train(folder)
    open_train(folder, augment=AugmentConfig(flip=0.0)).close()
    open_eval(folder).close()


@pytest.mark.parametrize("open_stream", [open_train, open_eval])
def test_data_that_were_changed_since_the_run_began_are_refused(make_dataset, files, open_stream):
    folder = make_dataset(files)
    digest = read_manifest(place(folder)).digest
    open_stream(folder, digest=digest).close()
    shutil.rmtree(folder)
    make_dataset([*files, files[0]])

    with pytest.raises(
        DatasetError,
        match=r"train was changed since the run began: its manifest\.json is another; "
        "give the data that it began with, or start a new run with --out",
    ):
        open_stream(folder, digest=digest)


def test_closed_streams_can_be_read_again(folder):
    stream = open_eval(folder)
    first = list(stream)
    stream.close()

    assert all(same(a, b) for a, b in zip(first, stream, strict=True))
    train = open_train(folder)
    train.close()
    assert same(next(train.batches(START))[0], take(folder, 1)[0][0])
