"""The index of a dataset folder as arrays: what a reader needs of every sample, and no more.

Of 14 million samples that is 24 bytes each. Keys, which only messages need, stay in the file and
are read a row group (a shard) at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data.manifest import INDEX, INDEX_SCHEMA, MANIFEST, Manifest
from pipelines.errors import DatasetError
from pipelines.storage import Place, plain_errors

_GROUPS = 64  # row groups read at a time: of a quarter million samples, some 10 MB
_KEPT_KEYS = 8  # shards whose keys are kept
_NAMES = ["shard", "label", "media_offset", "media_size", "crc32"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Columns:
    """Where each sample's bytes lie and what they are, by sample, shape [samples] each.

    Attributes:
        labels: int32; -1: not known.
        offsets: Byte in the shard where the media begin, int64.
        sizes: Bytes of the media, int64.
        crcs: crc32 of these bytes, uint32.
    """

    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crcs: NDArray[np.uint32]


class Index:
    """The open index of a dataset folder, checked against its manifest; threads may share it."""

    def __init__(self, folder: Place, manifest: Manifest) -> None:
        """Open the index; nothing but its footer is read.

        Raises:
            DatasetError: There is none, it is no index, or it lists other shards or counts of
                samples than the manifest.
            StorageError: The object store that it lies in cannot be reached.
        """
        self._folder, self._manifest, self._lock = folder, manifest, Lock()
        place = folder / INDEX
        if not place.is_file():
            raise DatasetError(
                f"{folder} has a manifest but no {INDEX}; restore it or make the shards again"
            )
        with self._reading():
            self._file = pq.ParquetFile(place.open(), pre_buffer=True)
        if not self._file.schema_arrow.equals(INDEX_SCHEMA):
            raise self._unreadable("its columns are others")
        self._check_counts()
        self._keys = lru_cache(maxsize=_KEPT_KEYS)(self._read_keys)

    def columns(self) -> Columns:
        """Read the columns of all samples.

        Raises:
            DatasetError: They cannot be read, or place a sample outside its shard or classes.
            StorageError: The object store that they lie in cannot be reached.
        """
        samples = self._manifest.samples
        columns = Columns(
            labels=np.empty(samples, np.int32),
            offsets=np.empty(samples, np.int64),
            sizes=np.empty(samples, np.int64),
            crcs=np.empty(samples, np.uint32),
        )
        done = 0
        for first in range(0, len(self._manifest.shards), _GROUPS):
            groups = range(first, min(first + _GROUPS, len(self._manifest.shards)))
            part = self._read(groups)
            self._check(groups, part)
            rows = slice(done, done + len(part["label"]))
            columns.labels[rows], columns.crcs[rows] = part["label"], part["crc32"]
            columns.offsets[rows], columns.sizes[rows] = part["media_offset"], part["media_size"]
            done = rows.stop
        return columns

    def key(self, shard: int, row: int) -> str:
        """The key of a sample, by its shard and its place there."""
        with self._lock:
            return str(self._keys(shard)[row])

    def _read(self, groups: Sequence[int]) -> dict[str, NDArray[Any]]:
        with self._reading():
            table = self._file.read_row_groups(list(groups), columns=_NAMES)
            # Arrow's own to_numpy would import pandas: a third of a second and 40 MB.
            return {name: np.from_dlpack(table[name].combine_chunks()) for name in _NAMES}

    def _read_keys(self, shard: int) -> list[str]:
        with self._reading():
            keys: list[str] = self._file.read_row_group(shard, columns=["key"])["key"].to_pylist()
        return keys

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell what goes wrong: with the store that the index lies in, or with the index."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if self._folder.local is None and isinstance(error, OSError):
                with plain_errors(self._folder / INDEX):
                    raise
            raise self._unreadable(str(error).partition("\n")[0]) from error

    def _check_counts(self) -> None:
        shards, footer = self._manifest.shards, self._file.metadata
        if footer.num_row_groups != len(shards):
            raise DatasetError(
                f"{self._folder / INDEX} lists {footer.num_row_groups} shards, {MANIFEST} says "
                f"{len(shards)}; {repair(self._folder)}"
            )
        for group, record in enumerate(shards):
            count = footer.row_group(group).num_rows
            if count != record.samples:
                raise DatasetError(
                    f"{self._folder / INDEX} lists {count} samples of {record.name}, {MANIFEST} "
                    f"says {record.samples}; {repair(self._folder)}"
                )

    def _check(self, groups: Sequence[int], part: dict[str, NDArray[Any]]) -> None:
        """That samples lie in the shards of their row groups and belong to classes there are."""
        records = [self._manifest.shards[group] for group in groups]
        counts = [record.samples for record in records]
        ends = np.repeat([record.bytes for record in records], counts)
        offsets, sizes, labels = part["media_offset"], part["media_size"], part["label"]
        fits = (offsets >= 0) & (sizes >= 0) & (offsets + sizes <= ends)
        fits &= (labels >= -1) & (labels < len(self._manifest.classes))
        fits &= part["shard"] == np.repeat(groups, counts)
        if not fits.all():
            wrong, starts = int(np.argmin(fits)), np.cumsum([0, *counts])
            which = int(np.searchsorted(starts, wrong, side="right")) - 1
            key = self.key(groups[which], wrong - int(starts[which]))
            raise DatasetError(
                f"{self._folder / INDEX} places sample {key!r} outside its shard or its "
                f"{len(self._manifest.classes)} classes; {repair(self._folder)}"
            )

    def _unreadable(self, why: str) -> DatasetError:
        return DatasetError(f"{self._folder / INDEX} cannot be read: {why}; {repair(self._folder)}")


def repair(folder: Place) -> str:
    """What to do about a dataset folder in which something is wrong: the end of a message."""
    return f"`mone verify {folder}` lists what was changed; restore it or make the shards again"
