"""Random access to samples: every byte checked, every fault named."""

import pickle
import subprocess
import sys
import textwrap
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.manifest import INDEX, INDEX_SCHEMA, MANIFEST, read_index, write_index
from pipelines.data.reader import SampleReader
from pipelines.data.settings import ReadConfig
from pipelines.errors import DatasetError
from pipelines.storage import Place

REPAIR = r"; `mone verify .*train` lists what was changed; restore it or make the shards again"


@pytest.fixture
def files(noise, encode):
    """26 images of different sizes."""
    return [encode(noise(20 + i, 40 - i, seed=i)) for i in range(26)]


@pytest.fixture
def folder(make_dataset, files):
    return make_dataset(files)


def open_reader(folder, **changes):
    return SampleReader(Place(str(folder)), ReadConfig(**changes))


def change_index(folder, change):
    """Write the index anew, its rows changed, a row group per shard as before."""
    tables = []
    for shard in range(6):
        rows = [row for row in read_index(Place(str(folder))).to_pylist() if row["shard"] == shard]
        tables.append(pa.Table.from_pylist(change(rows), schema=INDEX_SCHEMA))
    write_index(Place(str(folder)), tables)


def flip_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


# Reading


def test_the_reader_finds_every_samples_bytes_key_and_label(folder, files):
    reader = open_reader(folder)

    assert (reader.num_samples, reader.num_classes) == (26, 26)
    assert reader.shard_samples.tolist() == [5, 5, 5, 5, 5, 1]
    assert reader.labels.tolist() == list(range(26))
    assert [reader.read(i) for i in range(26)] == files
    assert [reader.key(i) for i in range(26)] == [f"key_{i}" for i in range(26)]
    assert reader.name(11) == f"sample 'key_11' in {folder / 'shard-000002.tar'}"


def test_a_closed_reader_holds_no_file_and_opens_again(folder, files):
    reader = open_reader(folder)
    reader.read(7)
    reader.close()

    assert reader.read(7) == files[7]


def test_another_process_gets_a_reader_by_its_arguments(folder, files):
    reader = open_reader(folder, check="never")

    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 (our own, from this process)

    assert copy.read(3) == files[3]


def test_threads_may_share_a_reader_that_keeps_fewer_files_open_than_they_read(
    folder, files, monkeypatch
):
    monkeypatch.setattr("pipelines.data.shard_files._OPEN_SHARDS", 1)
    reader, wrong = open_reader(folder), []

    def read(first):
        for turn in range(20):
            wrong.extend(
                i for i in range(26) if reader.read((i + first) % 26) != files[(i + first) % 26]
            )
            if turn % 7 == 0:
                reader.close()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_a_dataset_without_labels_can_be_read(make_dataset, files):
    folder = make_dataset(files, labels=[-1] * 26)

    reader = open_reader(folder)

    assert set(reader.labels.tolist()) == {-1}
    assert reader.read(25) == files[25]


# What is refused


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_is_refused_by_name(folder, change):
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)

    with pytest.raises(
        DatasetError,
        match=rf"shard .*shard-000001\.tar has {size + change} bytes, manifest\.json says {size}"
        + REPAIR,
    ):
        open_reader(folder)


def test_a_missing_shard_is_refused_by_name(folder):
    (folder / "shard-000003.tar").unlink()

    with pytest.raises(DatasetError, match=r"shard .*shard-000003\.tar is missing" + REPAIR):
        open_reader(folder)


def test_an_index_of_fewer_samples_than_the_manifest_is_refused(folder):
    change_index(folder, lambda rows: rows[:4])

    with pytest.raises(
        DatasetError,
        match=rf"{INDEX} lists 4 samples of shard-000000\.tar, {MANIFEST} says 5" + REPAIR,
    ):
        open_reader(folder)


def test_an_index_of_other_columns_is_refused(folder):
    pq.write_table(pa.table({"name": ["a"]}), folder / INDEX)

    with pytest.raises(
        DatasetError, match=rf"{INDEX} cannot be read: its columns are others" + REPAIR
    ):
        open_reader(folder)


def test_an_index_of_other_shards_than_the_manifest_is_refused(folder):
    table = read_index(Place(str(folder)))
    write_index(Place(str(folder)), [table])

    with pytest.raises(DatasetError, match=rf"{INDEX} lists 1 shards, {MANIFEST} says 6" + REPAIR):
        open_reader(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", 6),
        ("shard", 0),
        ("label", 26),
        ("label", -2),
        ("media_offset", 1 << 40),
        ("media_offset", -1),
        ("media_size", -1),
    ],
)
def test_an_index_that_points_outside_is_refused(folder, column, value):
    def change(rows):
        return [row | {column: value} if row["key"] == "key_9" else row for row in rows]

    change_index(folder, change)

    with pytest.raises(
        DatasetError,
        match="places sample 'key_9' outside its shard or its 26 classes" + REPAIR,
    ):
        open_reader(folder)


def test_a_missing_or_unreadable_index_is_refused(folder):
    (folder / INDEX).write_bytes(b"PAR1 but not really")
    with pytest.raises(DatasetError, match=rf"{INDEX} cannot be read: .*" + REPAIR):
        open_reader(folder)

    (folder / INDEX).unlink()
    with pytest.raises(DatasetError, match=f"has a manifest but no {INDEX}; restore it or make"):
        open_reader(folder)


def test_an_index_damaged_inside_is_refused(folder):
    path = folder / INDEX
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)  # the footer stays
    path.write_bytes(content)

    with pytest.raises(DatasetError, match=rf"{INDEX} cannot be read: .*" + REPAIR):
        open_reader(folder)


def test_an_index_with_gaps_is_refused(folder):
    change_index(folder, lambda rows: [row | {"label": None} for row in rows])

    with pytest.raises(DatasetError, match=rf"{INDEX} cannot be read: .* no nulls\." + REPAIR):
        open_reader(folder)


def test_images_are_read_without_what_takes_long_to_import(folder):
    code = f"""
        import sys
        from pipelines.data.settings import AugmentConfig, ClipConfig, ReadConfig, RowConfig
        from pipelines.data.reader import SampleReader
        from pipelines.data.rows import Rows
        from pipelines.storage import Place

        read = ReadConfig(decoder="simplejpeg")
        more = {{"read": read, "augment": AugmentConfig(), "clip": ClipConfig()}}
        config = RowConfig(image_size=16, frames=1, resize=18, **more)
        reader = SampleReader(Place({str(folder)!r}), read)
        Rows(reader, config, seed=0, samples_per_epoch=1).train(0, 0)
        print([name for name in ("pandas", "av", "ray") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


# Damage that shows when a sample is read


def offset_of(folder, sample):
    return read_index(Place(str(folder)))["media_offset"][sample].as_py()


def test_a_flipped_byte_in_a_sample_is_noticed(folder, files):
    flip_byte(folder / "shard-000001.tar", offset_of(folder, 7) + 100)
    reader = open_reader(folder)

    for _ in range(2):
        with pytest.raises(DatasetError, match=r"not those that were written \(crc32\)"):
            reader.read(7)
    assert reader.read(6) == files[6]
    assert open_reader(folder, check="never").read(7) != files[7]


def test_a_flipped_byte_in_a_header_loses_nothing(folder, files):
    """Other readers walk the headers, and lose what follows without a word."""
    flip_byte(folder / "shard-000001.tar", offset_of(folder, 7) - 512 + 124)
    reader = open_reader(folder)

    assert [reader.read(i) for i in range(26)] == files


def test_bytes_are_compared_only_when_they_are_first_read(folder):
    reader = open_reader(folder)
    first = reader.read(7)
    flip_byte(folder / "shard-000001.tar", offset_of(folder, 7))

    assert reader.read(7)[1:] == first[1:]


def test_a_shard_that_is_cut_off_under_a_reader_is_noticed(folder, files):
    reader = open_reader(folder)
    reader.read(0)
    path = folder / "shard-000001.tar"
    with path.open("r+b") as file:
        file.truncate(offset_of(folder, 7) + 10)

    assert reader.read(6) == files[6]
    for sample in (7, 8):
        with pytest.raises(DatasetError, match="its shard ends before it does"):
            reader.read(sample)


def test_a_shard_that_vanishes_under_a_reader_is_named(folder):
    reader = open_reader(folder)
    (folder / "shard-000001.tar").unlink()

    with pytest.raises(
        DatasetError,
        match=r"shard .*shard-000001\.tar cannot be read: No such file or directory" + REPAIR,
    ):
        reader.read(7)
