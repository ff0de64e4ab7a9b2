"""Bytes of shards, by shard, offset and size, wherever the shards lie; threads may share all of it.

Local files are read with `pread`: it lets go of the interpreter's lock while a disk or network
file system is slow (a memory map does not), and a file that was cut off gives a short answer,
where a map would end the process.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipelines.data.cache import ShardCache
from pipelines.data.manifest import ShardRecord
from pipelines.data.settings import ReadConfig
from pipelines.storage import Place, plain_errors

# Files held at a time: each keeps a descriptor, and 1,024 are a common limit.
_OPEN_SHARDS = 256
_FETCHES = 4  # shards that come from an object store at the same time

Records = Sequence[ShardRecord]


class ShardFiles(Protocol):
    """Where shards are read from."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer than `size` where the file ends before."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Get ready to read from these shards, the first first, without waiting for them."""

    def renew(self, shard: int, /) -> bool:
        """After a read of other bytes than were written: whether a next one may be better."""

    def capacity(self) -> float:
        """Bytes of shards that can be at hand together; infinite where none is copied."""

    def close(self) -> None:
        """Let go of files and threads; reading again opens them again."""


def open_shards(
    folder: Place, records: Records, read: ReadConfig, *, sharers: int = 1
) -> ShardFiles:
    """The shards of a folder, as `read` wants object stores to be read.

    Args:
        folder: Where they lie.
        records: What the manifest says of each.
        read: How to read them.
        sharers: Processes of this machine that read them at the same time, this one included.

    Raises:
        DatasetError: The cache is smaller than the largest shard.
    """
    if folder.local is not None:
        return LocalShards(folder.local, records)
    if read.remote == "ranges":
        return RangedShards(folder, records)
    return CachedShards(folder, records, read, sharers=sharers)


class LocalShards:
    """Shards on this machine's file systems."""

    def __init__(self, folder: Path, records: Records) -> None:
        self._folder, self._records = folder, records
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer than `size` where the file ends before."""
        return self._open(shard).read(size, offset)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing: the system reads local files well enough when they are asked for."""

    def renew(self, _shard: int, /) -> bool:
        """No: the file is what there is."""
        return False

    def capacity(self) -> float:
        """No end of them: they stay where they are."""
        return math.inf

    def close(self) -> None:
        """Let go of the files."""
        self._open.cache_clear()

    def _open_shard(self, shard: int) -> "_OpenFile":
        return _OpenFile(self._folder / self._records[shard].name)


class RangedShards:
    """Shards of an object store, each sample a request of its own."""

    def __init__(self, folder: Place, records: Records) -> None:
        self._folder, self._records = folder, records
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer than `size` where the object ends before."""
        with plain_errors(self._folder / self._records[shard].name):
            return bytes(self._open(shard).read_at(size, offset))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing: no shard is read whole."""

    def renew(self, _shard: int, /) -> bool:
        """No: the object is what there is."""
        return False

    def capacity(self) -> float:
        """No end of them: they stay where they are."""
        return math.inf

    def close(self) -> None:
        """Let go of the connections."""
        self._open.cache_clear()

    def _open_shard(self, shard: int) -> pa.NativeFile:
        return (self._folder / self._records[shard].name).open()


class CachedShards:
    """Shards of an object store, copied whole to a local cache before they are read.

    A copy is opened for one read only: held open, those that left the cache would keep their room
    on the disk, out of reach of all who need it.
    """

    def __init__(
        self, folder: Place, records: Records, read: ReadConfig, *, sharers: int = 1
    ) -> None:
        self._folder, self._records, self._sharers = folder, records, sharers
        limit = int(read.cache_gib * 2**30)
        largest = max(record.bytes for record in records)
        self._cache = ShardCache(read.cache or default_cache(), limit, largest=largest)
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: frozenset[int] = frozenset()
        self._renewed: set[int] = set()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched if it is not there."""
        while True:
            with suppress(FileNotFoundError):  # another fetch pushed it out: fetch it again
                return _OpenFile(self._fetch(shard)).read(size, offset)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch these shards, as far as this process's part of the cache holds them.

        What fails here fails again, and is then told, when the shard is read.
        """
        held = np.cumsum([self._records[shard].bytes for shard in shards])
        room = self._cache.capacity()
        if sum(record.bytes for record in self._records) > room:  # or there is room for all anyway
            room //= self._sharers
        wanted = shards[: int(np.searchsorted(held, room, side="right"))]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")
            for shard in wanted:
                if shard not in self._begun:
                    self._pool.submit(self._fetch, shard)
            self._begun = frozenset(wanted)

    def close(self) -> None:
        """End the threads that fetch, each after the shard it is at."""
        with self._lock:
            pool, self._pool, self._begun = self._pool, None, frozenset()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def capacity(self) -> float:
        """Bytes of shards that the cache and its disk hold together."""
        return self._cache.capacity()

    def renew(self, shard: int, /) -> bool:
        """Yes, from the object store: the copy is removed, once for a shard."""
        record = self._records[shard]
        with self._lock:
            if shard not in self._renewed:
                self._cache.drop(self._folder / record.name, sha256=record.sha256)
            self._renewed.add(shard)
        return True

    def _fetch(self, shard: int) -> Path:
        record = self._records[shard]
        where = self._folder / record.name
        return self._cache.fetch(where, size=record.bytes, sha256=record.sha256)


def default_cache() -> Path:
    """Where shards of object stores are kept unless `data.read.cache` says otherwise."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "mone" / "shards"


class _OpenFile:
    """An open file that closes when the last reader lets go of it, in whichever thread."""

    __slots__ = ("_descriptor",)

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)  # `self` keeps it open until then

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)  # it has none if opening failed
        if descriptor is not None:
            os.close(descriptor)
