"""Random access to the samples of a finished dataset folder, here or in an object store.

`SampleReader` says what lies where and hands out checked bytes. How an index becomes arrays is the
subject of `columns`, where bytes of shards come from that of `shard_files`; pixels are made in
`rows`.
"""

import zlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.data.columns import Index, repair
from pipelines.data.manifest import MANIFEST, Manifest, read_manifest
from pipelines.data.settings import ReadConfig
from pipelines.data.shard_files import open_shards
from pipelines.errors import DatasetError
from pipelines.storage import Place


class DamagedSampleError(DatasetError):
    """One sample's bytes are not those that were written, or do not decode."""


class SampleReader:
    """Random access to samples, numbered from 0 in shard order; safe to share by threads.

    Pickled, it is its arguments: the process that gets it opens the folder anew.

    Attributes:
        folder: The dataset folder.
        manifest: The dataset's manifest.
        labels: Label of every sample, int32, shape [num_samples]; -1: not known.
        shard_samples: Samples of every shard, int64, shape [shards].
    """

    def __init__(self, folder: Place, read: ReadConfig) -> None:
        """Open a dataset folder and check that shards and index fit the manifest.

        Hashes are not read here; that is what `mone verify` does. crc32s are compared when a
        sample is first read.

        Args:
            folder: A finished dataset folder.
            read: How to read it; `threads` and `prefetch` do not matter here.

        Raises:
            DatasetError: No finished dataset, a shard that is missing or of another size, an
                index of other samples, or a cache smaller than a shard.
        """
        self.folder, self._read = folder, read
        self.manifest = read_manifest(folder)
        _check_shards(folder, self.manifest)
        self._index = Index(folder, self.manifest)
        self._columns = self._index.columns()
        self.labels = self._columns.labels
        counts = [record.samples for record in self.manifest.shards]
        self.shard_samples: NDArray[np.int64] = np.array(counts, np.int64)
        self._starts: list[int] = [0, *np.cumsum(self.shard_samples).tolist()]
        self._files = open_shards(folder, self.manifest.shards, read)
        # A byte each: threads may write different ones at the same time. 1: nothing left to check.
        self._checked = bytearray(self.num_samples) if read.check == "first" else None

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes in the manifest, those without samples included."""
        return len(self.manifest.classes)

    def read(self, sample: int) -> bytes:
        """The original bytes of a sample.

        A copy in the cache that has gone bad is fetched again; where the object store has the same
        bytes, the sample is what is damaged.

        Raises:
            DamagedSampleError: The shard ends before them, or their crc32 is another one.
            DatasetError: The shard cannot be read.
        """
        shard = bisect_right(self._starts, sample) - 1
        data = self._bytes(shard, sample)
        damage = self._damage(sample, data)
        if damage and self._files.renew(shard):
            data = self._bytes(shard, sample)
            damage = self._damage(sample, data)
        if damage:
            raise DamagedSampleError(damage)
        if self._checked is not None:
            self._checked[sample] = 1
        return data

    def _bytes(self, shard: int, sample: int) -> bytes:
        offset, size = int(self._columns.offsets[sample]), int(self._columns.sizes[sample])
        try:
            return self._files.read(shard, offset, size)
        except OSError as error:
            raise DatasetError(
                f"shard {self._shard(shard)} cannot be read: {error.strerror or error}; "
                f"{repair(self.folder)}"
            ) from error

    def _damage(self, sample: int, data: bytes) -> str:
        """What is wrong with a sample's bytes; empty: nothing, as far as it is to be checked."""
        if len(data) != self._columns.sizes[sample]:
            return "its shard ends before it does"
        if self._checked is None or self._checked[sample]:
            return ""
        if zlib.crc32(data) != self._columns.crcs[sample]:
            return "its bytes are not those that were written (crc32)"
        return ""

    def key(self, sample: int) -> str:
        """The name of a sample in its dataset; read from the index, so not for every sample."""
        shard = bisect_right(self._starts, sample) - 1
        return self._index.key(shard, sample - self._starts[shard])

    def name(self, sample: int) -> str:
        """What messages call a sample: its key and shard."""
        shard = bisect_right(self._starts, sample) - 1
        return f"sample {self.key(sample)!r} in {self._shard(shard)}"

    def check_cache(self, shards: Sequence[int]) -> None:
        """Refuse a cache too small for shards that are read from at the same time.

        Raises:
            DatasetError: They lie in an object store and do not fit into its cache together.
        """
        needed = sum(self.manifest.shards[shard].bytes for shard in shards) / 2**30
        cached = self.folder.local is None and self._read.remote == "shards"
        if cached and needed > self._read.cache_gib:
            raise DatasetError(
                f"data.read.cache_gib of {self._read.cache_gib:g} does not hold the {len(shards)} "
                f"shards ({needed:.3g} GiB) that this worker reads from at a time; set it to more, "
                "data.order.lanes to less, or data.read.remote to ranges"
            )

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch shards that lie in an object store; the first are needed first."""
        self._files.prefetch(shards)

    def close(self) -> None:
        """Let go of the shard files; reading again opens them again."""
        self._files.close()

    def _shard(self, shard: int) -> Place:
        return self.folder / self.manifest.shards[shard].name

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[Place, ReadConfig]]:
        """Its arguments, since open files do not travel."""
        return SampleReader, (self.folder, self._read)


def _check_shards(folder: Place, manifest: Manifest) -> None:
    """That all shards are there and have their sizes, by one listing of the folder."""
    sizes = {entry.name: entry.size for entry in folder.entries() if not entry.is_folder}
    for record in manifest.shards:
        size = sizes.get(record.name)
        if size is None:
            raise DatasetError(f"shard {folder / record.name} is missing; {repair(folder)}")
        if size != record.bytes:
            raise DatasetError(
                f"shard {folder / record.name} has {size} bytes, {MANIFEST} says {record.bytes}; "
                f"{repair(folder)}"
            )
