"""Whole shards of an object store, kept on a local disk for as long as there is room.

A file of the cache is named after its sha256, which is compared while it is downloaded, so that
what bears the name is what the manifest means. The processes of a host share a cache: who needs a
shard that another is downloading waits for it. Shards that were fetched longest ago leave first;
one that is open stays readable, and on the disk, until it is closed: who reads opens it for that
moment only.

A download goes to a `.part` file that has the shard's room on the disk from the start, so that it
counts when others make room. It belongs to whoever holds the lock of its shard; the system lets go
of that lock when a process ends, however it ends, and what nobody holds is removed by the next who
looks.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from filelock import FileLock, Timeout

from pipelines.errors import DatasetError
from pipelines.storage import Place, plain_errors

CHUNK_BYTES = 16 << 20  # of a request to the object store
WAIT_S = 0.05  # until what others hold is looked at again
LET_GO_S = 5.0  # that a shard which has left may be read from, and take room, at most
FREE_BYTES = 2 << 30  # of the disk that are left to others, but no more than a twentieth of it
PART = ".part"
LOCKS = ".locks"
ROOM = "room"  # the lock of who counts and removes files
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Other files are never removed, should a folder be given that holds any.
_OURS = re.compile(r"[0-9a-f]{32}-.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """A file of the cache: when it was last fetched, nanoseconds, and its bytes."""

    used_ns: int
    path: Path
    size: int

    @property
    def is_part(self) -> bool:
        return self.path.name.endswith(PART)


class _Refused(NamedTuple):
    """A shard does not fit: bytes in its way that will leave before long, and the reason."""

    leaving: int
    why: str


class ShardCache:
    """Shards on a local disk, at most so many bytes of them.

    Args:
        folder: Where they are kept; made if it is not there.
        limit_bytes: Bytes of all shards together. A disk with less room holds fewer: some of it is
            always left free.
        largest: Bytes of the largest shard that will be asked for.

    Raises:
        DatasetError: The limit is below the largest shard.
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, largest: int) -> None:
        if limit_bytes < largest:
            raise DatasetError(
                f"data.read.cache_gib of {limit_bytes / 2**30:.3g} is below the largest shard of "
                f"{largest / 2**30:.3g} GiB; set it to several times that"
            )
        self.folder = folder
        self.limit_bytes = limit_bytes
        with plain_errors(Place(str(folder))):
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()

    def fetch(self, place: Place, *, size: int, sha256: str) -> Path:
        """A shard as a file of this machine, downloaded if it is not here yet.

        Other fetches may push the file out before it is opened; fetch it again then.

        Args:
            place: Where the shard lies.
            size: Its bytes, as the manifest has them.
            sha256: Its hash, as the manifest has it.

        Raises:
            DatasetError: What lies there is another file, or the disk is full.
            StorageError: The object store cannot be reached, or has no such file.
        """
        path = self._path(place, sha256)
        if not _touch(path, size):
            with self._lock(path.name):
                # While this one waited for the lock, another may have brought the file.
                if not _touch(path, size):
                    self._download(place, path, size, sha256)
        return path

    def drop(self, place: Place, *, sha256: str) -> None:
        """Remove the copy of a shard, in which something is wrong; the next fetch downloads it."""
        self._path(place, sha256).unlink(missing_ok=True)

    def _path(self, place: Place, sha256: str) -> Path:
        return self.folder / f"{sha256[:32]}-{place.name}"

    def capacity(self) -> int:
        """Bytes of shards that it can hold together: its limit, or what its disk has room for."""
        with self._lock(ROOM):
            return min(self.limit_bytes, sum(file.size for file in self._kept()) + self._free())

    def _download(self, place: Place, path: Path, size: int, sha256: str) -> None:
        part = path.with_name(path.name + PART)
        try:
            self._reserve(part, place, size)
            found = self._copy(place, part, size)
            if found != sha256:
                raise _other_file(place, f"its sha256 is {found}, not {sha256}")
            with self._lock(ROOM):  # who counts what is held sees one name or the other
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, place: Place, size: int) -> None:
        """Take the room of a shard, and wait for it while others download or still read."""
        begun = time.monotonic()
        while refused := self._refused(part, place, size):
            if refused.leaving:
                begun = time.monotonic()
            elif time.monotonic() > begun + LET_GO_S:
                raise self._full(place, refused.why)
            time.sleep(WAIT_S)

    def _refused(self, part: Path, place: Place, size: int) -> _Refused | None:
        """Make room for a shard and take it, or tell why there is none at the moment."""
        with self._lock(ROOM):
            part.unlink(missing_ok=True)
            self._remove_abandoned()
            kept = sorted(self._kept(), key=lambda file: (file.used_ns, file.path.name))
            whole = [file for file in kept if not file.is_part]
            parts = sum(file.size for file in kept if file.is_part)
            held, free = parts + sum(file.size for file in whole), self._free()
            if parts + size > self.limit_bytes or size > free + held - parts:
                return _Refused(parts, self._too_large(size))
            while held + size > self.limit_bytes or size > free:
                held, free = self._leave(whole.pop(0), held, free)
            with self._writing(place):
                why = _allocated(part, size)
            if why and whole:  # a quota, or readers of what has left: only the disk can say
                held, free = self._leave(whole.pop(0), held, free)
            return _Refused(held, why) if why else None

    def _leave(self, file: _Kept, held: int, free: int) -> tuple[int, int]:
        """Remove a shard; returns what is then held, and free once nobody reads it any more."""
        file.path.unlink(missing_ok=True)
        return held - file.size, free + file.size

    def _kept(self) -> Iterator[_Kept]:
        """The files of the cache at this moment, unfinished ones too."""
        for path in self.folder.iterdir():
            if _OURS.match(path.name):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    yield _Kept(used_ns=found.st_mtime_ns, path=path, size=found.st_size)

    def _free(self) -> int:
        """Bytes of the disk that the cache may still take."""
        return shutil.disk_usage(self.folder).free - self._left_to_others()

    def _left_to_others(self) -> int:
        return min(FREE_BYTES, shutil.disk_usage(self.folder).total // 20)

    def _too_large(self, size: int) -> str:
        others = self._left_to_others()
        return (
            f"it has {size} bytes, the disk {self._free() + others} left, of which {others} stay "
            "free"
        )

    def _copy(self, place: Place, part: Path, size: int) -> str:
        """Download a shard to a file and flush it to disk; returns the sha256 of what came."""
        digest = hashlib.sha256()
        with self._writing(place), part.open("r+b") as file:
            for chunk in _chunks(place, size):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _remove_abandoned(self) -> None:
        """Remove unfinished files whose owner has ended: nobody holds their lock."""
        for part in self.folder.glob(f"*{PART}"):
            if _OURS.match(part.name):
                with suppress(Timeout), self._lock(part.name.removesuffix(PART), wait_s=0):
                    part.unlink(missing_ok=True)

    def _lock(self, name: str, *, wait_s: float = -1) -> FileLock:
        """A lock between threads and processes; waits forever unless told how long."""
        return FileLock(self.folder / LOCKS / name, timeout=wait_s)

    @contextmanager
    def _writing(self, place: Place) -> Iterator[None]:
        """Tell what goes wrong with the disk of the cache."""
        try:
            yield
        except OSError as error:
            raise self._full(place, error.strerror or str(error)) from error

    def _full(self, place: Place, why: str) -> DatasetError:
        return DatasetError(
            f"the shard cache {self.folder} cannot take {place}: {why}; make room there, or set "
            "data.read.cache to a folder on a larger disk"
        )


def _touch(path: Path, size: int) -> bool:
    """Whether the cache has a file, which counts as used now."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _allocated(part: Path, size: int) -> str:
    """Make a file that has its room on the disk; returns why there is none, or nothing."""
    with part.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            file.truncate(0)
            return error.strerror or str(error)
    return ""


def _chunks(place: Place, size: int) -> Iterator[pa.Buffer]:
    """The content of a shard, piece by piece."""
    with place.open() as file:
        if file.size() != size:
            raise _other_file(place, f"it has {file.size()} bytes, not {size}")
        for start in range(0, size, CHUNK_BYTES):
            with plain_errors(place):
                chunk = file.read_buffer(min(CHUNK_BYTES, size - start))
            yield chunk


def _other_file(place: Place, why: str) -> DatasetError:
    return DatasetError(
        f"{place} is not the shard that the manifest names: {why}; "
        f"`mone verify {place.parent}` tells which others are not"
    )
