"""Random access to the samples of a finished dataset folder, here or in an object store.

`SampleReader` says what lies where and hands out checked bytes. How an index becomes arrays is the
subject of `columns`, where bytes of shards come from that of `shard_files`; pixels are made in
`rows`.
"""

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

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

    def __init__(self, folder: Place, read: ReadConfig, *, sharers: int = 1) -> None:
        """Open a dataset folder and check that shards and index fit the manifest.

        Hashes are not read here; that is what `mone verify` does. crc32s are compared when a
        sample is first read.

        Args:
            folder: A finished dataset folder.
            read: How to read it; `threads` and `prefetch` do not matter here.
            sharers: Processes of this machine that read it at the same time, this one included.

        Raises:
            DatasetError: No finished dataset, a shard that is missing or of another size, an
                index of other samples, or a cache smaller than a shard.
        """
        self.folder, self._read, self._sharers = folder, read, sharers
        self.manifest = read_manifest(folder)
        _check_shards(folder, self.manifest)
        self._index = Index(folder, self.manifest)
        self._columns = self._index.columns()
        self.labels = self._columns.labels
        counts = [record.samples for record in self.manifest.shards]
        self.shard_samples: NDArray[np.int64] = np.array(counts, np.int64)
        self._starts: list[int] = [0, *np.cumsum(self.shard_samples).tolist()]
        self._files = open_shards(folder, self.manifest.shards, read, sharers=sharers)
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

    def check_cache(self, count: int) -> None:
        """Refuse a cache too small for the shards that its sharers read from at the same time.

        Args:
            count: How many these are, at most.

        Raises:
            DatasetError: They lie in an object store and do not fit into its cache together.
        """
        sizes = sorted((record.bytes for record in self.manifest.shards), reverse=True)
        needed, capacity = sum(sizes[:count]), self._files.capacity()
        if needed > capacity:
            who = "one worker reads" if self._sharers == 1 else f"{self._sharers} workers read"
            raise DatasetError(
                f"the shard cache holds {capacity / 2**30:.3g} GiB (data.read.cache_gib "
                f"{self._read.cache_gib:g}, less where its disk has less), but {who} from up to "
                f"{count} shards ({needed / 2**30:.3g} GiB) at a time on this machine; set "
                "data.read.cache_gib to more, on a disk that has it, data.order.lanes or "
                "data.order.window to less, or data.read.remote to ranges"
            )

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch shards that lie in an object store; the first are needed first."""
        self._files.prefetch(shards)

    def close(self) -> None:
        """Let go of the shard files; reading again opens them again."""
        self._files.close()

    def _shard(self, shard: int) -> Place:
        return self.folder / self.manifest.shards[shard].name

    def __reduce__(self) -> tuple[partial["SampleReader"], tuple[Place, ReadConfig]]:
        """Its arguments, since open files do not travel."""
        return partial(SampleReader, sharers=self._sharers), (self.folder, self._read)


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
