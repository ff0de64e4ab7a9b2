"""The cache of whole shards: one download each, the oldest leave, nothing half-made is used."""

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.data.cache import CHUNK_BYTES, LOCKS, ROOM, ShardCache
from pipelines.errors import DatasetError
from pipelines.storage import Place, StorageError
from tests.object_store import bucket, s3_server
from tests.pipelines.data.small_disk import DISK_BYTES, small_disk

__all__ = ["bucket", "s3_server", "small_disk"]

SIZE = 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(folder: Path) -> list[str]:
    """Shards in a cache by the readable part of their names, sorted."""
    return sorted(path.name[33:] for path in folder.iterdir() if path.is_file())


class Store:
    """Shards a.tar, b.tar, ... of `SIZE` bytes in a bucket or folder."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.contents: dict[str, bytes] = {}

    def fetch(self, cache: ShardCache, name: str, size: int = SIZE) -> Path:
        if name not in self.contents:
            self.contents[name] = os.urandom(size)
            (self.place / name).write_bytes(self.contents[name])
        content = self.contents[name]
        path = cache.fetch(self.place / name, size=len(content), sha256=sha256(content))
        os.utime(path, ns=(0, next(CLOCK)))  # files of one clock tick have no order
        return path


CLOCK = iter(range(1, 10**9))


@pytest.fixture
def store(bucket: Place) -> Store:
    return Store(bucket / "data set")


@pytest.fixture
def nearby(tmp_path: Path) -> Store:
    """The same in a local folder, for what has nothing to do with the network."""
    return Store(Place(str(tmp_path / "store")))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were opened where they lie, in turn."""
    found: list[str] = []
    original = Place.open

    def spy(place: Place) -> object:
        found.append(place.name)
        time.sleep(0.05)  # as long as others need to ask for the same
        return original(place)

    monkeypatch.setattr(Place, "open", spy)
    return found


def cache_of(tmp_path: Path, shards: float) -> ShardCache:
    return ShardCache(tmp_path / "cache", int(shards * SIZE), largest=SIZE)


class TestFetching:
    def test_a_shard_is_downloaded_once_and_is_whole(
        self, tmp_path: Path, store: Store, opened: list[str]
    ) -> None:
        cache = cache_of(tmp_path, 3)
        for _ in range(3):
            path = store.fetch(cache, "a.tar")
            assert path.read_bytes() == store.contents["a.tar"]
            assert path.name.endswith("-a.tar")
        assert opened == ["a.tar"]

    def test_shards_of_several_chunks_arrive_whole(self, tmp_path: Path, store: Store) -> None:
        size = 2 * CHUNK_BYTES + 17
        cache = ShardCache(tmp_path / "cache", size, largest=size)
        path = store.fetch(cache, "a.tar", size)
        assert path.read_bytes() == store.contents["a.tar"]

    def test_the_next_process_finds_what_this_one_fetched(
        self, tmp_path: Path, store: Store, opened: list[str]
    ) -> None:
        store.fetch(cache_of(tmp_path, 3), "a.tar")
        store.fetch(cache_of(tmp_path, 3), "a.tar")
        assert opened == ["a.tar"]

    def test_threads_that_want_the_same_shard_download_it_once(
        self, tmp_path: Path, nearby: Store, opened: list[str]
    ) -> None:
        cache = cache_of(tmp_path, 3)
        wanted = ["a.tar", "b.tar"] * 8
        for name in "ab":
            nearby.contents[f"{name}.tar"] = os.urandom(SIZE)
            (nearby.place / f"{name}.tar").write_bytes(nearby.contents[f"{name}.tar"])
        with ThreadPoolExecutor(16) as pool:
            paths = list(pool.map(lambda name: nearby.fetch(cache, name), wanted))
        assert sorted(opened) == ["a.tar", "b.tar"]
        assert [path.read_bytes() for path in paths] == [nearby.contents[name] for name in wanted]

    def test_processes_that_want_the_same_shard_download_it_once(
        self, tmp_path: Path, bucket: Place
    ) -> None:
        content = os.urandom(SIZE)
        (bucket / "a.tar").write_bytes(content)
        arguments = [str(tmp_path / "cache"), f"{bucket}/a.tar", str(SIZE), sha256(content)]
        fetchers = [
            subprocess.Popen(
                [sys.executable, "-c", FETCHER, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(3)
        ]
        for fetcher in fetchers:  # all have started before any is let go
            assert fetcher.stdout is not None
            assert fetcher.stdout.readline() == b"ready\n"
        for fetcher in fetchers:
            assert fetcher.stdin is not None
            fetcher.stdin.write(b"\n")
            fetcher.stdin.flush()
        answers = [fetcher.communicate(timeout=60)[0] for fetcher in fetchers]
        assert [fetcher.returncode for fetcher in fetchers] == [0, 0, 0]
        assert sum(answer.count(b"opened") for answer in answers) == 1
        assert names(tmp_path / "cache") == ["a.tar"]


# Fetches one shard when told to, and says whether it opened it where it lies.
FETCHER = """
import sys, time
from pathlib import Path
from pipelines.data.cache import ShardCache
from pipelines.storage import Place
folder, place, size, sha256 = sys.argv[1:]
original = Place.open
def spy(place):
    print("opened")
    time.sleep(0.3)
    return original(place)
Place.open = spy
cache = ShardCache(Path(folder), 2 * int(size), largest=int(size))
print("ready", flush=True)
sys.stdin.readline()
cache.fetch(Place(place), size=int(size), sha256=sha256)
"""


class TestRoom:
    def test_what_was_fetched_longest_ago_leaves_first(self, tmp_path: Path, nearby: Store) -> None:
        cache = cache_of(tmp_path, 3.5)
        for name in ("a", "b", "c"):
            nearby.fetch(cache, name)
        nearby.fetch(cache, "a")
        nearby.fetch(cache, "d")
        assert names(cache.folder) == ["a", "c", "d"]
        nearby.fetch(cache, "e")
        assert names(cache.folder) == ["a", "d", "e"]

    def test_a_fetch_counts_as_use(self, tmp_path: Path, nearby: Store) -> None:
        cache = cache_of(tmp_path, 3)
        path = nearby.fetch(cache, "a")
        assert path.stat().st_mtime < 1
        content = nearby.contents["a"]
        cache.fetch(nearby.place / "a", size=SIZE, sha256=sha256(content))
        assert path.stat().st_mtime == pytest.approx(time.time(), abs=60)

    def test_a_mapped_shard_that_leaves_stays_readable(self, tmp_path: Path, nearby: Store) -> None:
        cache = cache_of(tmp_path, 1)
        path = nearby.fetch(cache, "a")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            nearby.fetch(cache, "b")
            assert not path.exists()
            assert shard[:] == nearby.contents["a"]

    def test_it_never_holds_more_than_its_limit(self, tmp_path: Path, nearby: Store) -> None:
        cache = cache_of(tmp_path, 2.5)
        wanted = [f"{number % 7}.tar" for number in range(60)]
        for name in wanted[:7]:
            nearby.contents[name] = os.urandom(SIZE)
            (nearby.place / name).write_bytes(nearby.contents[name])

        def fetch(name: str) -> int:
            content = nearby.contents[name]
            cache.fetch(nearby.place / name, size=SIZE, sha256=sha256(content))
            with FileLock(cache.folder / LOCKS / ROOM), os.scandir(cache.folder) as found:
                return sum(SIZE for entry in found if entry.is_file())

        with ThreadPoolExecutor(6) as pool:
            assert max(pool.map(fetch, wanted)) <= 2 * SIZE

    def test_files_that_are_not_ours_stay(self, tmp_path: Path, nearby: Store) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.part").write_bytes(b"years of work")
        cache = cache_of(tmp_path, 1)
        nearby.fetch(cache, "a")
        nearby.fetch(cache, "b")
        assert (tmp_path / "cache" / "thesis.part").read_bytes() == b"years of work"

    def test_a_limit_below_the_largest_shard_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"data.read.cache_gib of 1 is below the .* 2.5 GiB"):
            ShardCache(tmp_path / "cache", 2**30, largest=5 * 2**29)
        assert not (tmp_path / "cache").exists()

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match=r"file/cache cannot be read or written: Not a dir"):
            ShardCache(tmp_path / "file" / "cache", 1, largest=1)


class TestSmallDisk:
    """A limit far beyond the disk, which holds three shards beside what is left free."""

    QUARTER = DISK_BYTES // 4

    def cache(self, small_disk: Path) -> ShardCache:
        return ShardCache(small_disk / "cache", 2**40, largest=self.QUARTER)

    def test_it_holds_what_fits_and_leaves_some_free(self, small_disk: Path, nearby: Store) -> None:
        cache = self.cache(small_disk)
        assert cache.capacity() == DISK_BYTES - DISK_BYTES // 20
        for name in "abcde":
            nearby.fetch(cache, name, self.QUARTER)
        assert names(cache.folder) == ["c", "d", "e"]
        assert cache.capacity() == DISK_BYTES - DISK_BYTES // 20

    def test_downloads_at_the_same_time_do_not_fill_it(
        self, small_disk: Path, nearby: Store, opened: list[str]
    ) -> None:
        cache = self.cache(small_disk)
        (small_disk / "other").write_bytes(bytes(self.QUARTER * 3 // 2))
        wanted = [f"{number}.tar" for number in range(6)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda name: nearby.fetch(cache, name, self.QUARTER), wanted))
        assert sorted(opened) == wanted
        assert len(names(cache.folder)) == 2

    def test_who_still_reads_a_shard_that_left_is_waited_for(
        self, small_disk: Path, nearby: Store
    ) -> None:
        cache = self.cache(small_disk)
        (small_disk / "other").write_bytes(bytes(self.QUARTER * 5 // 2))
        with ThreadPoolExecutor(1) as pool:
            with nearby.fetch(cache, "a", self.QUARTER).open():
                waiting = pool.submit(nearby.fetch, cache, "b", self.QUARTER)
                time.sleep(0.3)
                assert not waiting.done()
            waiting.result(timeout=30)
        assert names(cache.folder) == ["b"]

    def test_what_others_fill_it_with_is_told_and_no_shard_leaves_for_it(
        self, small_disk: Path, nearby: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipelines.data.cache.LET_GO_S", 0)
        cache = self.cache(small_disk)
        nearby.fetch(cache, "small")
        (small_disk / "other").write_bytes(bytes(DISK_BYTES * 8 // 10))
        wanted = (
            rf"disk/cache cannot take .*/a: it has {self.QUARTER} bytes, the disk \d+ left, of "
            rf"which {DISK_BYTES // 20} stay free; make room there, or set data.read.cache to a "
            r"folder on a larger disk"
        )
        with pytest.raises(DatasetError, match=wanted):
            nearby.fetch(cache, "a", self.QUARTER)
        assert names(cache.folder) == ["small"]


class TestDamage:
    def test_another_content_is_named_and_not_kept(self, tmp_path: Path, store: Store) -> None:
        cache = cache_of(tmp_path, 3)
        store.contents["a.tar"] = os.urandom(SIZE)
        (store.place / "a.tar").write_bytes(os.urandom(SIZE))
        wanted = (
            r"data set/a.tar is not the shard .*: its sha256 is .*`mone verify s3://.*/data set`"
        )
        with pytest.raises(DatasetError, match=wanted):
            store.fetch(cache, "a.tar")
        assert names(cache.folder) == []

    def test_another_length_is_told_before_it_is_downloaded(
        self, tmp_path: Path, store: Store
    ) -> None:
        cache = cache_of(tmp_path, 3)
        store.contents["a.tar"] = os.urandom(SIZE)
        (store.place / "a.tar").write_bytes(os.urandom(SIZE - 1))
        with pytest.raises(DatasetError, match=r"a.tar is not the shard.*has 999 bytes, not 1000"):
            store.fetch(cache, "a.tar")
        assert names(cache.folder) == []

    def test_a_missing_shard_is_named(self, tmp_path: Path, store: Store) -> None:
        cache = cache_of(tmp_path, 3)
        store.contents["a.tar"] = os.urandom(SIZE)
        with pytest.raises(StorageError, match=r"data set/a.tar does not exist"):
            store.fetch(cache, "a.tar")
        assert names(cache.folder) == []

    def test_a_file_that_was_cut_off_is_fetched_again(self, tmp_path: Path, nearby: Store) -> None:
        cache = cache_of(tmp_path, 3)
        os.truncate(nearby.fetch(cache, "a"), SIZE // 2)
        assert nearby.fetch(cache, "a").read_bytes() == nearby.contents["a"]

    def test_a_killed_download_leaves_nothing_that_counts(
        self, tmp_path: Path, nearby: Store
    ) -> None:
        (nearby.place / "a").write_bytes(b"x" * SIZE)
        process = start_downloading(tmp_path / "cache", nearby.place / "a")
        assert names(tmp_path / "cache") == ["a.part"]
        cache_of(tmp_path, 3)  # a start while the owner lives leaves its file alone
        assert names(tmp_path / "cache") == ["a.part"]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cache = cache_of(tmp_path, 1)
        assert names(tmp_path / "cache") == []
        nearby.fetch(cache, "b")
        assert names(tmp_path / "cache") == ["b"]

    def test_who_needs_the_room_of_a_killed_download_takes_it(
        self, tmp_path: Path, nearby: Store
    ) -> None:
        (nearby.place / "a").write_bytes(b"x" * SIZE)
        cache = cache_of(tmp_path, 1)
        process = start_downloading(tmp_path / "cache", nearby.place / "a")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(nearby.fetch, cache, "b")
            time.sleep(0.3)
            assert not waiting.done()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            waiting.result(timeout=30)
        assert names(tmp_path / "cache") == ["b"]

    def test_a_full_disk_is_told_before_the_download(
        self, tmp_path: Path, nearby: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipelines.data.cache.LET_GO_S", 0)
        cache = ShardCache(tmp_path / "cache", 2**62, largest=2**62)
        (nearby.place / "a").write_bytes(b"x")
        with pytest.raises(DatasetError, match=r"cannot take .*/a: it has \d+ bytes, the disk \d+"):
            cache.fetch(nearby.place / "a", size=2**61, sha256="0" * 64)
        assert names(cache.folder) == []

    def test_a_disk_that_fills_up_is_told(self, tmp_path: Path, nearby: Store) -> None:
        (nearby.place / "a").write_bytes(b"x" * SIZE)
        ended = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache"), f"{nearby.place}/a"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "cannot take" in ended.stderr
        assert "File too large; make room there, or set data.read.cache to" in ended.stderr
        assert names(tmp_path / "cache") == []


# A process whose files may not grow beyond 500 bytes: the same way out as a disk that is full.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from pipelines.data.cache import ShardCache
from pipelines.storage import Place
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
cache = ShardCache(Path(sys.argv[1]), 1000, largest=1000)
cache.fetch(Place(sys.argv[2]), size=1000, sha256="0" * 64)
"""

# Begins a download and stays in the middle of it.
DOWNLOADER = """
import sys, time
from pathlib import Path
from pipelines.data import cache
from pipelines.storage import Place
def stuck(place, size):
    yield b"x" * (size // 2)
    print("half", flush=True)
    time.sleep(600)
cache._chunks = stuck
cache.ShardCache(Path(sys.argv[1]), 1000, largest=1000).fetch(
    Place(sys.argv[2]), size=1000, sha256="0" * 64)
"""


def start_downloading(folder: Path, place: Place) -> "subprocess.Popen[bytes]":
    """A process that is half-way through a download."""
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOADER, str(folder), str(place)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    return process
