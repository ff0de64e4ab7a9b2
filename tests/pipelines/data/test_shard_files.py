"""Shards of an object store: fetched before they are needed, read again when pushed out."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.backends import get_backend
from pipelines.build import training_stream
from pipelines.data.manifest import INDEX, ShardRecord, read_index, read_manifest, write_index
from pipelines.data.reader import DamagedSampleError, SampleReader
from pipelines.data.settings import AugmentConfig, OrderConfig, ReadConfig
from pipelines.data.shard_files import CachedShards, default_cache
from pipelines.errors import DatasetError
from pipelines.run_data import RunData
from pipelines.storage import Place, StorageError
from tests.object_store import bucket, s3_server
from tests.pipelines.data.small_disk import DISK_BYTES, small_disk
from tests.pipelines.data.streams import START, open_train, working_threads
from tests.pipelines.tiny import tiny_config

__all__ = ["bucket", "s3_server", "small_disk"]


@pytest.fixture
def files(noise, encode):
    """26 images of different sizes."""
    return [encode(noise(20 + i, 40 - i, seed=i)) for i in range(26)]


@pytest.fixture
def remote(make_dataset, files, bucket):
    """Six shards in a bucket."""
    local, folder = Place(str(make_dataset(files))), bucket / "data" / "train"
    for entry in local.entries():
        (folder / entry.name).write_bytes((local / entry.name).read_bytes())
    return folder


def cached(tmp_path, gib=1.0):
    return ReadConfig(cache=tmp_path / "cache", cache_gib=gib)


def kept(tmp_path):
    return sorted(path.name[33:] for path in (tmp_path / "cache").glob("*.tar"))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_shards_come_before_they_are_read(tmp_path, remote, files):
    reader = SampleReader(remote, cached(tmp_path))
    assert kept(tmp_path) == []

    reader.prefetch([4, 1])

    wait_for(lambda: kept(tmp_path) == ["shard-000001.tar", "shard-000004.tar"])
    assert reader.read(7) == files[7]
    reader.close()
    assert not working_threads()


def test_no_more_shards_are_fetched_ahead_than_the_cache_holds(tmp_path, remote):
    size = read_manifest(remote).shards[0].bytes
    reader = SampleReader(remote, cached(tmp_path, gib=2.5 * size / 2**30))

    reader.prefetch([0, 1, 2, 3])

    wait_for(lambda: len(kept(tmp_path)) == 2)
    time.sleep(0.1)  # long enough for a third
    assert kept(tmp_path) == ["shard-000000.tar", "shard-000001.tar"]
    reader.close()


def test_a_shard_that_was_pushed_out_is_fetched_again(tmp_path, remote, files):
    size = read_manifest(remote).shards[0].bytes
    reader = SampleReader(remote, cached(tmp_path, gib=1.2 * size / 2**30))

    for _ in range(2):
        assert [reader.read(i) for i in range(26)] == files
        reader.close()
    assert len(kept(tmp_path)) <= 2  # the last one is smaller


def test_training_fetches_the_shards_of_its_windows_and_ends_its_threads(tmp_path, remote):
    stream = open_train(remote, read=cached(tmp_path), order=OrderConfig(lanes=4, window=2))
    batches = stream.batches(START)
    next(batches)

    wait_for(lambda: len(kept(tmp_path)) == 6)
    batches.close()
    stream.close()
    assert not working_threads()


def test_a_cache_that_does_not_hold_what_is_read_at_a_time_is_refused(tmp_path, remote):
    size = read_manifest(remote).shards[0].bytes
    read = cached(tmp_path, gib=2.5 * size / 2**30)

    with pytest.raises(
        DatasetError,
        match=r"the shard cache holds \S+ GiB \(data\.read\.cache_gib \S+, less where its disk has "
        r"less\), but one worker reads from up to 6 shards \(\S+ GiB\) at a time on this machine; "
        r"set data\.read\.cache_gib to more, on a disk that has it, data\.order\.lanes or "
        r"data\.order\.window to less, or data\.read\.remote to ranges",
    ):
        open_train(remote, read=read)
    open_train(remote, read=read, order=OrderConfig(lanes=1, window=1)).close()


def test_the_workers_of_a_machine_are_counted_where_they_share_a_cache(tmp_path, remote):
    largest = max(record.bytes for record in read_manifest(remote).shards)
    share = {"read": cached(tmp_path, gib=4 * largest / 2**30), "world": 4}
    share |= {"order": OrderConfig(lanes=4, window=1)}
    for rank in range(4):
        open_train(remote, rank=rank, **share, host_ranks=4).close()

    share["order"] = OrderConfig(lanes=4, window=2)
    open_train(remote, rank=1, **share, host_ranks=2).close()
    with pytest.raises(DatasetError, match=r"but 4 workers read from up to 6 shards \(\S+ GiB\)"):
        open_train(remote, rank=1, **share, host_ranks=4)


def test_a_run_counts_the_workers_that_its_backend_knows_of(tmp_path, remote):
    largest = max(record.bytes for record in read_manifest(remote).shards)
    config = tiny_config(str(remote.parent), tmp_path / "run")
    data = replace(
        config.data,
        read=cached(tmp_path, gib=4 * largest / 2**30),
        order=OrderConfig(lanes=4, window=2),
    )
    began = RunData(train=read_manifest(remote).digest, val="", classes="")
    backend = get_backend("cpu")
    backend.rank, backend.world, backend.host_ranks = 1, 4, 4

    with pytest.raises(DatasetError, match=r"but 4 workers read from up to 6 shards"):
        training_stream(replace(config, data=data), backend, began)


def test_a_worker_fetches_ahead_what_its_part_of_the_cache_holds(tmp_path, remote):
    largest = max(record.bytes for record in read_manifest(remote).shards)
    reader = SampleReader(remote, cached(tmp_path, gib=4 * largest / 2**30), sharers=2)

    reader.prefetch([0, 1, 2, 3])

    wait_for(lambda: len(kept(tmp_path)) == 2)
    time.sleep(0.1)  # long enough for a third
    assert kept(tmp_path) == ["shard-000000.tar", "shard-000001.tar"]
    reader.close()

    reader = SampleReader(remote, cached(tmp_path, gib=6 * largest / 2**30), sharers=2)
    reader.prefetch(range(6))
    wait_for(lambda: len(kept(tmp_path)) == 6)
    reader.close()


def test_what_fails_ahead_is_told_when_it_is_read(tmp_path, remote, files):
    reader = SampleReader(remote, cached(tmp_path))
    (remote / "shard-000001.tar").remove()

    reader.prefetch([1, 2])

    wait_for(lambda: kept(tmp_path) == ["shard-000002.tar"])
    with pytest.raises(StorageError, match=r"shard-000001\.tar does not exist; check its name"):
        reader.read(7)
    assert reader.read(12) == files[12]
    reader.close()


def damage(path, data):
    """Change the middle of a file's bytes where they lie in a shard."""
    content = path.read_bytes()
    at = content.index(data) + len(data) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("cut", [False, True])
def test_a_copy_in_the_cache_that_has_gone_bad_is_fetched_again(tmp_path, remote, files, cut):
    reader = SampleReader(remote, cached(tmp_path))
    reader.read(7)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    if cut:
        os.truncate(copy, copy.read_bytes().index(files[8]) + 9)
    else:
        damage(copy, files[8])

    assert reader.read(8) == files[8]

    assert hashlib.sha256(copy.read_bytes()).hexdigest().startswith(copy.name[:32])
    assert reader.read(9) == files[9]
    reader.close()


def test_threads_that_find_a_copy_gone_bad_all_get_the_right_bytes(tmp_path, remote, files):
    reader = SampleReader(remote, cached(tmp_path))
    reader.read(7)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    for sample in (5, 6, 8, 9):
        damage(copy, files[sample])

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(reader.read, [5, 6, 8, 9] * 4))

    assert got == [files[sample] for sample in [5, 6, 8, 9] * 4]
    reader.close()


def test_what_the_store_has_damaged_itself_is_fetched_again_but_once(tmp_path, remote, files):
    table = read_index(remote)
    crcs = [crc ^ (sample in (7, 8)) for sample, crc in enumerate(table["crc32"].to_pylist())]
    column = table.schema.get_field_index("crc32")
    table = table.set_column(column, "crc32", pa.array(crcs, pa.uint32()))
    write_index(remote, [table.slice(start, 5) for start in range(0, 26, 5)])
    reader = SampleReader(remote, cached(tmp_path))

    assert reader.read(9) == files[9]
    (path,) = (tmp_path / "cache").glob("*.tar")

    with path.open() as first:
        with pytest.raises(DamagedSampleError, match=r"not those that were written \(crc32\)"):
            reader.read(7)
        assert os.fstat(first.fileno()).st_nlink == 0
    with path.open() as second:
        with pytest.raises(DamagedSampleError, match=r"not those that were written \(crc32\)"):
            reader.read(8)
        assert os.fstat(second.fileno()).st_nlink == 1
    assert reader.read(9) == files[9]
    reader.close()


def test_shards_that_were_pushed_out_leave_the_disk_at_once(tmp_path, remote):
    size = read_manifest(remote).shards[0].bytes
    reader = SampleReader(remote, cached(tmp_path, gib=2.5 * size / 2**30))
    for sample in range(0, 26, 5):
        reader.read(sample)
        assert deleted_files(tmp_path) == []
    reader.close()


@pytest.fixture
def quarters(tmp_path):
    """Five shards, each a quarter of a small disk, in a folder that is read as a bucket is."""
    records = []
    (tmp_path / "store").mkdir()
    for number in range(5):
        content = os.urandom(DISK_BYTES // 4)
        name = f"shard-{number:06}.tar"
        (tmp_path / "store" / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        size = len(content)
        records.append(ShardRecord(name=name, samples=1, bytes=size, sha256=digest, version=1))
    return Place(str(tmp_path / "store")), records


def test_workers_read_on_where_the_disk_is_smaller_than_the_limit(small_disk, quarters):
    workers = [CachedShards(*quarters, ReadConfig(cache=small_disk / "cache")) for _ in range(2)]
    folder, records = quarters

    for worker in [*workers, *workers]:
        for number, record in enumerate(records):
            expected = (folder / record.name).read_bytes()[7:107]
            assert worker.read(number, 7, 100) == expected

    assert len(list((small_disk / "cache").glob("*.tar"))) == 3


def test_no_more_shards_are_fetched_ahead_than_the_disk_holds(small_disk, quarters):
    shards = CachedShards(*quarters, ReadConfig(cache=small_disk / "cache"))

    shards.prefetch(range(5))

    wait_for(lambda: kept(small_disk) == [f"shard-{number:06}.tar" for number in range(3)])
    time.sleep(0.1)  # long enough for a fourth
    assert kept(small_disk) == [f"shard-{number:06}.tar" for number in range(3)]
    shards.close()


def deleted_files(tmp_path):
    """Files of the cache that only this process still holds."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(descriptor.readlink()))
    return [link for link in links if link.startswith(str(tmp_path)) and "(deleted)" in link]


def test_an_index_that_cannot_be_reached_any_more_is_told(tmp_path, remote):
    reader = SampleReader(remote, cached(tmp_path))
    (remote / INDEX).remove()

    with pytest.raises(StorageError, match=rf"^s3://.*/{INDEX} (does not exist|cannot be)"):
        reader.key(7)
    reader.close()


def test_with_mixup_the_shards_of_the_rows_before_are_fetched_too(tmp_path, remote):
    mixed = AugmentConfig(mixup=0.5)
    streams = [
        open_train(remote, read=cached(tmp_path / name), order=OrderConfig(lanes=4, window=1),
                   rank=1, world=2, augment=augment)
        for name, augment in (("plain", AugmentConfig()), ("mixed", mixed))
    ]  # fmt: skip
    fetched = []
    for stream, name in zip(streams, ("plain", "mixed"), strict=True):
        next(stream.batches(START))
        stream.close()
        fetched.append(set(kept(tmp_path / name)))

    assert fetched[0] < fetched[1]


def test_a_missing_object_is_refused_by_name(tmp_path, remote):
    (remote / "shard-000003.tar").remove()

    with pytest.raises(DatasetError, match=r"shard s3://.*/shard-000003\.tar is missing; `mone"):
        SampleReader(remote, cached(tmp_path))


def test_the_cache_lies_where_caches_of_a_user_do(monkeypatch, tmp_path, remote):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "mone" / "shards"
    manifest = read_manifest(remote)
    shards = CachedShards(remote, manifest.shards, ReadConfig())
    shards.read(0, 0, 10)
    shards.close()
    assert len(list(default_cache().glob("*.tar"))) == 1

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == Path(tmp_path / "home" / ".cache" / "mone" / "shards")
