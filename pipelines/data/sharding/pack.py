"""One shard: the samples of a range of hashes into a tar. Plain code that a Ray task calls.

A finished shard leaves a side file in `.unfinished/` with a hash of what it was made of, its record
and its index rows. That is how an interrupted run is continued and what index and manifest are
made from in the end (`shards`). The tar is written under a temporary name, flushed to disk and
renamed, or uploaded in one piece: it is whole or absent.
"""

import hashlib
import json
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data.manifest import INDEX_SCHEMA, ShardRecord, classes_sha256
from pipelines.data.sharding.plan import ShardJob, ShardRange
from pipelines.data.sharding.reencode import reencode
from pipelines.data.sharding.scanned import Scanned, rows_between, whole_file
from pipelines.errors import ArchiveError, DatasetError
from pipelines.storage import Place, plain_errors

UNFINISHED = ".unfinished"
REPEATED = "has the key of an earlier member"
KNOWN = "is in the dataset already (same key)"
BLOCK = 512
_ZEROS = bytes(BLOCK)
CHUNK_BYTES = 2**20  # handed to the hash and the file at once
OPEN_FILES = 64
READ_AHEAD = 16  # samples on their way from an object store
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class PackJob:
    """What every task that writes shards needs to know, beside which shard.

    Attributes:
        job: What is made of which archive; its classes are known.
        files: Where the samples that were found lie.
        known: For every part, where the keys lie that its dataset has already.
        versions: For every part, the version of the dataset that is made.
    """

    job: ShardJob
    files: tuple[Scanned, ...]
    known: tuple[tuple[Scanned, ...], ...]
    versions: tuple[int, ...]


class Repeat(NamedTuple):
    """A sample that was left out: position of its unit, its position there, its name, why."""

    unit: int
    seq: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SideFile:
    """What a finished shard left beside it.

    Attributes:
        digest: A hash of all that the shard was made of.
        record: The shard; None: every sample was a repeat, and there is none.
        repeats: What was left out.
        known: Samples that the dataset has already; of a large one, too many to name.
    """

    digest: str
    record: ShardRecord | None
    repeats: tuple[Repeat, ...]
    known: int = 0


class _Sample(NamedTuple):
    """A row of `scanned.SAMPLES`, with its unit."""

    order: int
    part: int
    seq: int
    key: str
    class_name: str | None
    name: str
    path: str
    offset: int
    size: int
    remark: str | None
    crc32: int
    unit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What became of a shard: whether it was there before, its samples, and repeated keys."""

    kept: bool
    samples: int
    repeated: int = 0


def write_shard(pack: PackJob, shard: ShardRange) -> Packed:
    """Write a shard and its side file, unless both are there.

    Raises:
        ArchiveError: The archive was changed after it was scanned.
        StorageError: The archive cannot be read or the shard not written; nothing half-made stays.
        DatasetError: An image cannot be re-encoded.
    """
    samples, repeats, known = _samples(pack, shard)
    digest = _digest(pack, shard, samples, repeats, known)
    repeated = sum(repeat.reason == REPEATED for repeat in repeats)
    out = pack.job.parts[shard.part].out
    if _is_whole(out, shard.name, digest):
        return Packed(kept=True, samples=len(samples), repeated=repeated)
    record, index = None, INDEX_SCHEMA.empty_table()
    if samples:
        record, index = _write_tar(pack, shard, samples)
    else:  # an interrupted run of other archives may have left one
        (out / shard.name).remove()
    side = SideFile(digest=digest, record=record, repeats=repeats, known=known)
    _write_side_file(out, shard, side, index)
    return Packed(kept=False, samples=len(samples), repeated=repeated)


def _samples(pack: PackJob, shard: ShardRange) -> tuple[list[_Sample], tuple[Repeat, ...], int]:
    """The shard's samples in their order, of equal keys the first one found; how many are known."""
    rows = rows_between(pack.job, pack.files, shard.first, shard.last)
    rows = rows.filter(pc.equal(rows["part"], shard.part))
    by = [(name, "ascending") for name in ("order", "key", "unit", "seq")]
    columns = [column.to_pylist() for column in rows.select(_Sample._fields).sort_by(by).columns]
    known = rows_between(pack.job, pack.known[shard.part], shard.first, shard.last)["key"]
    known_keys = set(known.to_pylist())
    kept: list[_Sample] = []
    repeats = []
    again = 0
    for sample in map(_Sample._make, zip(*columns, strict=True)):
        if sample.key in known_keys:
            again += 1
        elif kept and kept[-1].key == sample.key:
            repeats.append(Repeat(sample.unit, sample.seq, sample.name, REPEATED))
        else:
            kept.append(sample)
    return kept, tuple(repeats), again


def _digest(
    pack: PackJob,
    shard: ShardRange,
    samples: list[_Sample],
    repeats: tuple[Repeat, ...],
    known: int,
) -> str:
    job = pack.job
    told = [
        (shard.name, pack.versions[shard.part], job.resized, job.source.archive.where),
        classes_sha256(job.classes or ()),
        samples,
        repeats,
        known,
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _write_tar(
    pack: PackJob, shard: ShardRange, samples: list[_Sample]
) -> tuple[ShardRecord, pa.Table]:
    job = pack.job
    labels = {name: label for label, name in enumerate(job.classes or ())}
    place = job.parts[shard.part].out / shard.name
    with whole_file(place) as path, path.open("wb", buffering=0) as file:
        tar, rows = TarWriter(file), []
        for sample, data in zip(samples, _contents(job.source.archive, samples), strict=True):
            with plain_errors(place):
                rows.append(_add(job, tar, shard, sample, labels, data))
        with plain_errors(place):
            tar.finish()
    record = ShardRecord(
        name=shard.name,
        samples=len(samples),
        bytes=tar.size,
        sha256=tar.sha256.hexdigest(),
        version=pack.versions[shard.part],
    )
    columns = [
        pa.array(column, field.type)
        for column, field in zip(zip(*rows, strict=True), INDEX_SCHEMA, strict=True)
    ]
    return record, pa.Table.from_arrays(columns, schema=INDEX_SCHEMA)


def _add(
    job: ShardJob,
    tar: "TarWriter",
    shard: ShardRange,
    sample: _Sample,
    labels: Mapping[str, int],
    data: bytes,
) -> tuple[Any, ...]:
    """Write one sample's fields; returns its index row."""
    origin: dict[str, Any] = {"member": sample.name}
    if sample.class_name is not None:
        origin["class"] = sample.class_name
    crc32 = sample.crc32
    if job.resized:
        try:
            data, sizes = reencode(data, job.resized)
        except DatasetError as error:
            raise DatasetError(f"{sample.name} cannot be resized: it {error}") from error
        crc32 = zlib.crc32(data)
        origin["resized"] = sizes.told()
    media = "jpg" if job.source.media == "image" else sample.name.rpartition(".")[2].lower()
    media_offset = tar.add(f"{sample.key}.{media}", data)
    label, cls_offset, cls = NO_LABEL, 0, b""
    if sample.class_name is not None:
        label = labels[sample.class_name]
        cls = b"%d" % label
        cls_offset = tar.add(f"{sample.key}.cls", cls)
    told = _ENCODE(origin).encode()
    json_offset = tar.add(f"{sample.key}.json", told)
    return (
        sample.key,
        shard.number,
        label,
        media,
        media_offset,
        len(data),
        crc32,
        cls_offset,
        len(cls),
        json_offset,
        len(told),
        sample.remark,
    )


_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def _contents(archive: Place, samples: list[_Sample]) -> Iterator[bytes]:
    """The bytes of the samples in turn; from an object store some are under way at a time."""

    @lru_cache(OPEN_FILES)
    def opened(path: str) -> pa.NativeFile:
        return (archive / path).open()

    def read(sample: _Sample) -> bytes:
        with plain_errors(archive / sample.path):
            data: bytes = opened(sample.path).read_at(sample.size, sample.offset)
        if zlib.crc32(data) != sample.crc32:
            raise ArchiveError(
                f"{sample.name} was changed after it was scanned; leave {archive} as it is while "
                "it is read"
            )
        return data

    if archive.local:
        yield from map(read, samples)
        return
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = iter(samples)
        under_way: deque[Future[bytes]] = deque(
            pool.submit(read, sample) for sample in islice(waiting, READ_AHEAD)
        )
        while under_way:
            data = under_way.popleft().result()
            under_way.extend(pool.submit(read, sample) for sample in islice(waiting, 1))
            yield data


# Tars.


_MODE_AND_OWNER = b"0000644\0" + 2 * b"0000000\0"
_DAY = b"0" * 11 + b"\0"  # 1970-01-01: nothing of the machine or the day gets in
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_CHECKSUM = sum(_MODE_AND_OWNER) + sum(_DAY) + sum(_REST) + 8 * ord(" ")


def header(name: str, size: int) -> bytes:
    """A file's header as Python's `tarfile` writes it in PAX format, several times faster."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    name_bytes, size_octal = name.encode(), b"%011o" % size
    # The low half of Adler-32 is one plus the sum of the bytes, and ten times faster than `sum`.
    checksum = _CHECKSUM + (zlib.adler32(name_bytes + size_octal) & 0xFFFF) - 1
    return b"%b%b%b\0%b%06o\0 %b" % (
        name_bytes.ljust(100, b"\0"),
        _MODE_AND_OWNER,
        size_octal,
        _DAY,
        checksum,
        _REST,
    )


class TarWriter:
    """Writes a tar, counting and hashing it.

    Args:
        file: Unbuffered; closed by whoever opened it.
    """

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self._pieces: list[bytes] = []
        self._waiting = 0
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Add a file; returns the byte where its data begin."""
        head = header(name, len(data))
        begin = self.size + len(head)
        padding = -len(data) % BLOCK
        self._pieces += (head, data, _ZEROS[:padding])
        self._count(len(head) + len(data) + padding)
        return begin

    def finish(self) -> None:
        """Add the end-of-archive blocks and hand over what waits."""
        self._pieces.append(bytes(2 * BLOCK))
        self._count(2 * BLOCK)
        self._flush()

    def _count(self, added: int) -> None:
        self.size += added
        self._waiting += added
        if self._waiting >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        chunk = memoryview(b"".join(self._pieces))
        self._pieces.clear()
        self._waiting = 0
        self.sha256.update(chunk)
        while chunk:
            chunk = chunk[self._file.write(chunk) :]


# Side files.


def _is_whole(out: Place, name: str, digest: str) -> bool:
    if not side_file(out, name).is_file():
        return False
    side, _ = read_side_file(out, name)
    if side.digest != digest:
        return False
    shard = out / name
    return not side.record or (shard.is_file() and shard.size() == side.record.bytes)


def side_file(out: Place, shard_name: str) -> Place:
    """Where a shard's side file lies until the dataset is finished."""
    return out / UNFINISHED / f"{shard_name}.parquet"


def read_side_file(out: Place, shard_name: str) -> tuple[SideFile, pa.Table]:
    """A finished shard's side file: what it says, and the shard's rows of the index."""
    with side_file(out, shard_name).open() as file:
        rows = pq.read_table(file)
    told = json.loads(rows.schema.metadata[b"told"])
    side = SideFile(
        digest=told["digest"],
        record=told["record"] and ShardRecord(**told["record"]),
        repeats=tuple(Repeat(*repeat) for repeat in told["repeats"]),
        known=told["known"],
    )
    return side, rows.replace_schema_metadata()


def _write_side_file(out: Place, shard: ShardRange, side: SideFile, rows: pa.Table) -> None:
    with whole_file(side_file(out, shard.name)) as path:
        told = {"told": json.dumps(asdict(side))}
        pq.write_table(rows.replace_schema_metadata(told), path, compression="zstd")
