"""From a sample to its pixels, and what a bad sample does: stop the run, or give its place away."""

import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.data.order import sample_seed
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.transforms import eval_image, train_image
from pipelines.data.reader import SampleReader
from pipelines.data.rows import Damage, Rows, Skips
from pipelines.data.settings import AugmentConfig, ReadConfig
from pipelines.errors import DatasetError
from pipelines.storage import Place
from tests.pipelines.data.streams import ROWS, open_eval, open_train

BROKEN = b"not an image"


@pytest.fixture
def files(noise, encode):
    """12 images of different sizes."""
    return [encode(noise(20 + i, 40 - i, seed=i)) for i in range(12)]


def rows_of(folder, **changes):
    config = replace(ROWS, read=ReadConfig(**changes))
    reader = SampleReader(Place(str(folder)), config.read)
    return Rows(reader, config, seed=3, samples_per_epoch=12)


def skipping(folder, share=1.0):
    return rows_of(folder, on_corrupt="skip", corrupt_share=share)


def with_broken(files, *broken):
    return [BROKEN if i in broken else data for i, data in enumerate(files)]


def test_a_row_is_a_function_of_seed_epoch_and_sample(make_dataset, files):
    rows = rows_of(make_dataset(files))

    row = rows.train(7, 2)

    expected = train_image(
        files[7],
        size=16,
        augment=AugmentConfig(),
        decoder="pillow",
        rng=SampleRandom(sample_seed(3, 2, 7)),
    )
    assert row.sample == 7
    assert row.pixels.shape == (1, 16, 16, 3)
    assert np.array_equal(row.pixels[0], expected)
    assert not np.array_equal(rows.train(7, 3).pixels, row.pixels)


def test_a_test_has_one_view_of_an_image(make_dataset, files):
    rows = rows_of(make_dataset(files))

    pixels = rows.test(7)

    assert rows.views == 1
    assert pixels.shape == (1, 1, 16, 16, 3)
    assert np.array_equal(pixels[0, 0], eval_image(files[7], size=16, resize=18, decoder="pillow"))


# A bad sample stops the run


@pytest.mark.parametrize("make", [lambda rows: rows.train(7, 0), lambda rows: rows.test(7)])
@pytest.mark.parametrize("data", [BROKEN, b"", "cut off"])
def test_a_sample_that_does_not_decode_names_shard_and_key(make_dataset, files, make, data):
    files[7] = files[7][:300] if data == "cut off" else data
    rows = rows_of(make_dataset(files))

    with pytest.raises(
        DatasetError,
        match=r"sample 'key_7' in .*shard-000001\.tar: does not decode as an image: .*; "
        r"`mone verify .*train` lists what was changed; restore it or make the shards again, or "
        r"set data\.read\.on_corrupt to skip",
    ):
        make(rows)


def test_a_changed_byte_names_shard_and_key(make_dataset, files):
    folder = make_dataset(files)
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[content.index(files[7]) + 50] ^= 1
    path.write_bytes(content)

    with pytest.raises(
        DatasetError, match=r"sample 'key_7' in .*shard-000001\.tar: its bytes are not those that"
    ):
        rows_of(folder).train(7, 0)


def test_a_fault_of_our_own_says_in_which_sample(make_dataset, files, monkeypatch):
    def fails(*_args, **_settings):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pipelines.data.rows.train_image", fails)
    rows = skipping(make_dataset(files))

    with pytest.raises(ZeroDivisionError, match="ours") as caught:
        rows.train(7, 0)
    assert "in sample 'key_7' in " in caught.value.__notes__[0]
    assert rows.damage.count == 0


# ... or gives its place away


def test_the_next_sample_that_decodes_takes_the_place_and_its_random_numbers(make_dataset, files):
    rows = skipping(make_dataset(with_broken(files, 6, 7, 8)))

    row = rows.train(7, 2)

    expected = train_image(
        files[9],
        size=16,
        augment=AugmentConfig(),
        decoder="pillow",
        rng=SampleRandom(sample_seed(3, 2, 7)),
    )
    assert row.sample == 9
    assert np.array_equal(row.pixels[0], expected)
    assert rows.damage.count == 1


def test_behind_the_last_sample_comes_the_first(make_dataset, files):
    rows = skipping(make_dataset(with_broken(files, 11, 0)))

    assert rows.train(11, 0).sample == 1


def test_a_test_leaves_out_what_it_cannot_read(make_dataset, files):
    rows = skipping(make_dataset(with_broken(files, 7)))

    name, why = rows.test(7)
    assert name.startswith("sample 'key_7' in ")
    assert why.startswith("does not decode as an image")
    assert rows.test(8).shape == (1, 1, 16, 16, 3)
    assert rows.damage.count == 1


def test_each_bad_sample_is_named_once_and_every_time_counted(make_dataset, files):
    rows, skips = skipping(make_dataset(with_broken(files, 7, 2))), Skips()

    for epoch in range(3):
        for sample in (7, 2, 3):
            skipped = rows.train(sample, epoch).skipped
            assert (skipped is None) == (sample == 3)
            skips.add([skipped] if skipped else [])

    assert rows.damage.count == skips.count == 6
    (seventh, why), (second, _) = skips.names.items()
    assert seventh.startswith("sample 'key_7' in ")
    assert seventh.endswith("shard-000001.tar")
    assert why.startswith("does not decode as an image")
    assert second.startswith("sample 'key_2' in ")


def test_a_dataset_of_which_nothing_decodes_is_given_up(make_dataset):
    rows = skipping(make_dataset([BROKEN] * 12))

    with pytest.raises(
        DatasetError,
        match=r"sample 'key_7' in .* and the 11 samples after it cannot be used, the last of them: "
        "does not decode as an image: .*; `mone verify",
    ):
        rows.train(7, 0)


def test_a_missing_shard_is_not_skipped_over(make_dataset, files):
    folder = make_dataset(files)
    rows = skipping(folder)
    (folder / "shard-000001.tar").unlink()

    with pytest.raises(DatasetError, match=r"shard-000001\.tar cannot be read: No such file"):
        rows.train(7, 0)


# The budget


def test_more_bad_samples_than_the_budget_stop_the_run(make_dataset, files):
    rows = skipping(make_dataset(with_broken(files, 3, 7)), share=0.1)  # 1.2 of 12

    rows.train(3, 0)
    with pytest.raises(
        DatasetError,
        match=r"2 of 12 samples were skipped, more than data\.read\.corrupt_share \(0\.1\) allows; "
        r"the last is sample 'key_7' in .*shard-000001\.tar: does not decode as an image: .*; "
        "`mone verify",
    ):
        rows.train(7, 0)


def test_a_dataset_of_one_sample_that_does_not_decode_is_given_up(make_dataset):
    rows = skipping(make_dataset([BROKEN]))

    with pytest.raises(
        DatasetError, match=r"and the 0 samples after it cannot be used, the last of them: does not"
    ):
        rows.train(0, 0)


def test_the_budget_is_of_all_epochs_begun():
    damage = Damage(Place("there"), 0.01, 1000)
    for _ in range(10):
        damage.skip("sample 'a'", "bad")
    with pytest.raises(DatasetError, match="11 of 1000 samples were skipped"):
        damage.skip("sample 'b'", "bad")

    damage.read(1000)
    with pytest.raises(DatasetError, match="12 of 1000 samples were skipped"):
        damage.skip("sample 'b'", "bad")
    damage.read(1)
    for _ in range(8):
        damage.skip("sample 'b'", "bad")
    with pytest.raises(DatasetError, match=r"21 of 2000 samples .* the last is sample 'c': worse"):
        damage.skip("sample 'c'", "worse")


def test_no_share_at_all_stops_at_the_first_bad_sample():
    with pytest.raises(DatasetError, match="1 of 9 samples were skipped"):
        Damage(Place("there"), 0.0, 9).skip("sample 'a'", "bad")


def test_threads_count_together():
    damage = Damage(Place("there"), 1.0, 10)

    def work():
        for i in range(500):
            damage.read(1)
            damage.skip(f"sample {i}", "bad")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert damage.count == 4000


# Images and videos


@pytest.mark.parametrize("open_stream", [open_train, open_eval])
def test_images_for_clips_and_videos_for_images_are_refused(make_dataset, files, open_stream):
    images, videos = make_dataset(files), make_dataset(files, media="mp4", name="videos")

    with pytest.raises(
        DatasetError,
        match=r"train holds images, but model\.video\.frames is 8; set model\.video\.frames to 1 "
        r"or data\.root to a dataset of videos",
    ):
        open_stream(images, frames=8)
    with pytest.raises(
        DatasetError,
        match=r"videos holds videos, but model\.video\.frames is 1; set model\.video\.frames to "
        r"the frames of a clip, such as 32, or data\.root to a dataset of images",
    ):
        open_stream(videos)


def test_images_of_every_kind_become_rows(make_dataset, noise, encode):
    """Grey, palette, transparent, CMYK, one pixel: whatever the archive held."""
    kinds = [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "GIF")]
    images = [encode(noise(20, 30, mode=mode), kind) for mode, kind in kinds]
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1), (9, 8, 7)).save(pixel, "PNG")
    rows = rows_of(make_dataset([*images, pixel.getvalue()]))

    for sample in range(6):
        assert rows.train(sample, 0).pixels.shape == (1, 16, 16, 3)
        assert rows.test(sample).shape == (1, 1, 16, 16, 3)
    assert (rows.test(5) == (9, 8, 7)).all()
