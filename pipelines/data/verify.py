"""A dataset folder against its manifest: every byte of every shard, of the index, of the manifest.

Finds and names change; it does not mend it. Writing is `shards`' work.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipelines.data.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    index_shards,
    read_manifest,
)
from pipelines.data.sharding.pack import UNFINISHED, header
from pipelines.data.sharding.plan import SHARD_NAME
from pipelines.storage import Place, StorageError, plain_errors

Progress = Callable[[int, int], None]

CHUNK_BYTES = 8 * 2**20
REMOTE_THREADS = 16
NAMED_SAMPLES = 3


def verify(folder: Place, progress: Progress | None = None) -> list[str]:
    """Compare a dataset with its manifest: files, sizes, hashes.

    Args:
        folder: The dataset.
        progress: Called with the bytes compared and those of all files, from any thread.

    Returns:
        One sentence per problem; empty if the dataset is whole.

    Raises:
        DatasetError: There is no manifest to compare with, or it was changed.
    """
    manifest = read_manifest(folder)
    sizes = {entry.name: entry.size for entry in folder.entries() if not entry.is_folder}
    check = _Check(folder, manifest, sizes, progress)
    threads = REMOTE_THREADS if folder.local is None else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(check.file, (*(s.name for s in manifest.shards), INDEX)))
    index_is_whole = found[-1] is None
    named = [
        problem + check.where(number)
        if problem and index_is_whole and shard.name in check.changed
        else problem
        for number, (shard, problem) in enumerate(zip(manifest.shards, found[:-1], strict=True))
    ]
    known = {shard.name for shard in manifest.shards}
    extra = [
        f"{name} is not in {MANIFEST}"
        for name in sizes
        if SHARD_NAME.fullmatch(name) and name not in known
    ]
    return [problem for problem in (*named, found[-1], *extra) if problem]


def left_in(folder: Place) -> str | None:
    """The first file by which a folder is a dataset though it has no manifest; None: it is none."""
    names = [entry.name for entry in folder.entries()] if folder.is_folder() else []
    ours = (name for name in names if name in (INDEX, UNFINISHED) or SHARD_NAME.fullmatch(name))
    return None if MANIFEST in names else next(ours, None)


class _Check:
    """The comparison of one dataset; threads share it.

    Args:
        folder: The dataset.
        manifest: What it should be.
        sizes: Of the files that are there.
        progress: See `verify`.

    Attributes:
        changed: Files that were read and have other bytes than they should have.
    """

    def __init__(
        self,
        folder: Place,
        manifest: Manifest,
        sizes: dict[str, int],
        progress: Progress | None,
    ) -> None:
        self.changed: set[str] = set()
        self._folder, self._manifest, self._sizes = folder, manifest, sizes
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._all = manifest.bytes + sizes.get(INDEX, 0)
        self._records = {shard.name: shard for shard in manifest.shards}

    def file(self, name: str) -> str | None:
        """What is wrong with a shard or the index."""
        size, record = self._sizes.get(name), self._records.get(name)
        if size is None:
            return f"{name} is missing"
        if record and size != record.bytes:
            return f"{name} has {size} bytes, {MANIFEST} says {record.bytes}"
        expected = record.sha256 if record else self._manifest.index_sha256
        try:
            found = self._sha256(self._folder / name)
        except StorageError as error:
            return f"{name} cannot be read: {error}"
        if found == expected:
            return None
        self.changed.add(name)
        return f"{name} was changed: its sha256 differs"

    def _sha256(self, place: Place) -> str:
        digest = hashlib.sha256()
        with plain_errors(place), place.open() as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                self._count(len(chunk))
        return digest.hexdigest()

    def _count(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress:
                self._progress(self._done, self._all)

    def where(self, number: int) -> str:
        """In which samples a changed shard differs, as far as the index can tell."""
        place = self._folder / self._manifest.shards[number].name
        try:
            with plain_errors(place), place.open() as file:
                (rows,) = index_shards(self._folder, [number])
                keys = [row["key"] for row in rows.to_pylist() if not _is_whole(file, row)]
        except StorageError:  # that it was changed is told all the same
            return ""
        if not keys:
            return " (in no sample's image, video, class or name)"
        more = f" and {len(keys) - NAMED_SAMPLES} more" if len(keys) > NAMED_SAMPLES else ""
        return f" (sample {', '.join(map(repr, keys[:NAMED_SAMPLES]))}{more})"


def _is_whole(file: pa.NativeFile, row: dict[str, Any]) -> bool:
    """Whether a sample's media has its crc32, its class its label, and each field its header."""
    media = file.read_at(row["media_size"], row["media_offset"])
    if zlib.crc32(media) != row["crc32"]:
        return False
    fields = [(row["media"], "media"), ("json", "json")]
    if row["cls_size"]:
        fields.append(("cls", "cls"))
        if file.read_at(row["cls_size"], row["cls_offset"]) != b"%d" % row["label"]:
            return False
    for suffix, field in fields:
        head = header(f"{row['key']}.{suffix}", row[f"{field}_size"])
        if file.read_at(len(head), row[f"{field}_offset"] - len(head)) != head:
            return False
    return True
