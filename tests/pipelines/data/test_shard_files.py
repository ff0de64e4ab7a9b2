"""Shards of an object store: fetched before they are needed, read again when pushed out."""

import time
from pathlib import Path

import pytest

from pipelines.data.manifest import read_manifest
from pipelines.data.reader import SampleReader
from pipelines.data.settings import OrderConfig, ReadConfig
from pipelines.data.shard_files import CachedShards, default_cache
from pipelines.errors import DatasetError
from pipelines.storage import Place, StorageError
from tests.object_store import bucket, s3_server
from tests.pipelines.data.streams import START, open_train, working_threads

__all__ = ["bucket", "s3_server"]


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
        match=r"data\.read\.cache_gib of \S+ does not hold the \d shards \(\S+ GiB\) that this "
        r"worker reads from at a time; set it to more, data\.order\.lanes to less, or "
        r"data\.read\.remote to ranges",
    ):
        open_train(remote, read=read)
    open_train(remote, read=read, order=OrderConfig(lanes=1, window=1)).close()


def test_what_fails_ahead_is_told_when_it_is_read(tmp_path, remote, files):
    reader = SampleReader(remote, cached(tmp_path))
    (remote / "shard-000001.tar").remove()

    reader.prefetch([1, 2])

    wait_for(lambda: kept(tmp_path) == ["shard-000002.tar"])
    with pytest.raises(StorageError, match=r"shard-000001\.tar does not exist; check its name"):
        reader.read(7)
    assert reader.read(12) == files[12]
    reader.close()


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
