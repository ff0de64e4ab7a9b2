"""What scans found, in Parquet files: one per unit, sorted by order hash, written whole or absent.

That is how sharding takes the same memory for any number of samples: a task reads the rows of
its own range of hashes by the files' statistics, and what is known of a unit as a whole is a few
numbers. A file that is there is never made again, so an interrupted scan goes on where it was.
Where many units would give every task many files to open, `merge` makes few of them.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data.archives.probe import LONG
from pipelines.data.archives.scan import UNREADABLE, scan
from pipelines.data.manifest import index_shards
from pipelines.data.sharding.plan import (
    BIN_BITS,
    BINS,
    PartCount,
    ShardJob,
    order_hash,
    short_digest,
)
from pipelines.data.sharding.reencode import refused
from pipelines.data.sources.base import Member
from pipelines.errors import ArchiveError
from pipelines.storage import Place, plain_errors

GROUP_ROWS = 4096  # of a row group: what a range of hashes is read by
RUN_ROWS = 2**18  # sorted together: bounds the memory of scanning a unit of any size
SAMPLES = pa.schema(
    [
        ("order", pa.uint64()),  # hash that shuffles
        ("part", pa.int8()),  # position in ShardJob.parts
        ("seq", pa.int64()),  # position in the unit
        ("key", pa.string()),
        ("class_name", pa.string()),
        ("name", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("remark", pa.string()),
        ("crc32", pa.uint32()),
    ]
)
PROBLEMS = pa.schema(
    [("part", pa.int8()), ("seq", pa.int64()), ("name", pa.string()), ("reason", pa.string())]
)
KEYS = pa.schema([("order", pa.uint64()), ("key", pa.string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFound:
    """A scanned unit as a whole.

    Attributes:
        counts: Numbers of every part.
        bins: Bins of order hashes that hold samples, as `part * BINS + bin`.
        samples: How many each holds.
    """

    counts: tuple[PartCount, ...]
    bins: NDArray[np.int64]
    samples: NDArray[np.int64]

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        counts = [asdict(count) for count in self.counts]
        return {"counts": counts, "bins": self.bins.tolist(), "samples": self.samples.tolist()}

    @classmethod
    def of(cls, told: dict[str, Any]) -> "UnitFound":
        """Back from JSON."""
        return cls(
            counts=tuple(PartCount(**count) for count in told["counts"]),
            bins=np.array(told["bins"], np.int64),
            samples=np.array(told["samples"], np.int64),
        )


@contextmanager
def whole_file(place: Place) -> Iterator[Path]:
    """A temporary file to write within the block; afterwards it is put in place, whole.

    On this machine it lies in the same folder, so that putting is renaming.

    Raises:
        StorageError: Whatever the system says within the block, with the name of the file.
    """
    folder = place.local.parent if place.local else Path(tempfile.gettempdir())
    with plain_errors(place if place.local else Place(str(folder))):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".tmp", dir=folder)
        os.close(handle)
    temporary = Path(name)
    try:
        with plain_errors(place if place.local else Place(name)):
            temporary.chmod(0o644)
            yield temporary
        place.put(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def scan_unit(job: ShardJob, number: int) -> UnitFound:
    """Scan a unit into its files, unless they are there.

    Args:
        job: What is made of which archive.
        number: Position of the unit in the source.

    Raises:
        PipelineError: The archive cannot be read or the result not written.
    """
    place = scan_file(job, number)
    if not place.is_file():
        _scan(job, number, place)
    histogram = np.zeros(len(job.parts) * BINS, np.int32)
    with place.open() as file:
        table = pq.ParquetFile(file)
        told = json.loads(table.metadata.metadata[b"told"])
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=["order", "part"])
            np.add.at(histogram, _bins(rows), 1)
    (bins,) = np.nonzero(histogram)
    counts = tuple(PartCount(**count) for count in told)
    return UnitFound(counts=counts, bins=bins, samples=histogram[bins].astype(np.int64))


def scan_file(job: ShardJob, number: int) -> Place:
    """Where the samples of a unit lie."""
    return job.scratch / f"{job.units[number]}.parquet"


def _problem_file(job: ShardJob, number: int) -> Place:
    return job.scratch / f"{job.units[number]}-problems.parquet"


def _bins(rows: pa.Table) -> NDArray[np.int64]:
    order: NDArray[np.uint64] = rows["order"].to_numpy()
    part: NDArray[np.int8] = rows["part"].to_numpy()
    return (order >> np.uint64(64 - BIN_BITS)).astype(np.int64) + part.astype(np.int64) * BINS


def _scan(job: ShardJob, number: int, place: Place) -> None:
    """The unit's problems into one file, and then, since it tells that both are whole, samples."""
    counts = [PartCount() for _ in job.parts]
    samples, problems = _Sorted(SAMPLES, "order"), _Sorted(PROBLEMS, None)
    with (
        whole_file(place) as path,
        whole_file(_problem_file(job, number)) as problem_path,
        samples.open(path),
        problems.open(problem_path),
    ):
        for seq, member in enumerate(scan(job.source, job.source.units[number])):
            part = job.part_of(member.key, member.split)
            if part is None:
                continue
            problem = member.problem or _cannot_be_resized(job, member)
            if problem is None:
                samples.add(_sample_row(job, member, part, seq))
                _count_sample(counts[part], member)
            elif problem.startswith(UNREADABLE):
                raise ArchiveError(f"{member.name} {problem}")
            else:
                problems.add((part, seq, member.name, problem))
                counts[part].problems += 1
                counts[part].lost += member.lost or 0
                counts[part].open_ended += member.lost is None
        samples.note(json.dumps([asdict(count) for count in counts]))


def _cannot_be_resized(job: ShardJob, member: Member) -> str | None:
    """Why a sample cannot be re-encoded where that is asked for; few are looked at again."""
    if job.resized is None or LONG not in (member.remark or ""):
        return None
    place = job.source.archive / member.path
    with plain_errors(place), place.open() as file:
        return refused(file.read_at(member.size, member.offset), job.resized)


def _sample_row(job: ShardJob, member: Member, part: int, seq: int) -> tuple[Any, ...]:
    return (
        order_hash(job.seed, member.key),
        part,
        seq,
        member.key,
        member.class_name,
        member.name,
        member.path,
        member.offset,
        member.size,
        member.remark,
        member.crc32,
    )


def _count_sample(count: PartCount, member: Member) -> None:
    count.samples += 1
    count.bytes += member.size
    if member.class_name is None:
        count.unlabelled += 1
    else:
        count.classes[member.class_name] = count.classes.get(member.class_name, 0) + 1


class _Sorted:
    """Rows into a Parquet file, sorted in runs; no more than a run is in memory."""

    def __init__(self, schema: pa.Schema, by: str | None) -> None:
        self._schema, self._by = schema, by
        self._rows: list[tuple[Any, ...]] = []
        self._run: list[pa.RecordBatch] = []

    @contextmanager
    def open(self, path: Path) -> Iterator[None]:
        with pq.ParquetWriter(path, self._schema, compression="zstd") as self._writer:
            yield
            self._pack()
            self._write()

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) == GROUP_ROWS:
            self._pack()

    def note(self, told: str) -> None:
        """Something to keep in the file beside the rows."""
        self._writer.add_key_value_metadata({"told": told})

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [[] for _ in self._schema]
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._run.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows.clear()
        if len(self._run) * GROUP_ROWS >= RUN_ROWS:
            self._write()

    def _write(self) -> None:
        run = pa.Table.from_batches(self._run, self._schema)
        self._run.clear()
        if run.num_rows:
            run = run.sort_by(self._by) if self._by else run
            self._writer.write_table(run, row_group_size=GROUP_ROWS)


def problems(job: ShardJob, number: int) -> Iterator[dict[str, Any]]:
    """What is wrong with which members of a scanned unit, in their order: rows of `PROBLEMS`."""
    with _problem_file(job, number).open() as file:
        for batch in pq.ParquetFile(file).iter_batches(GROUP_ROWS):
            yield from batch.to_pylist()


def first_problems(job: ShardJob, numbers: Iterable[int], most: int) -> list[dict[str, Any]]:
    """The first problems of the units."""
    return list(islice((row for number in numbers for row in problems(job, number)), most))


def file_stems(job: ShardJob, number: int) -> Iterator[str]:
    """Names without folder and suffix of every file of a scanned unit, samples and problems."""
    for place in (scan_file(job, number), _problem_file(job, number)):
        with place.open() as file:
            for batch in pq.ParquetFile(file).iter_batches(GROUP_ROWS, columns=["name"]):
                for name in batch["name"].to_pylist():
                    yield name.rsplit("/", 1)[-1].rpartition(".")[0]


# From units to ranges of hashes.


@dataclass(frozen=True, kw_only=True, slots=True)
class Scanned:
    """A file of rows sorted by order hash.

    Attributes:
        name: In the scratch folder.
        unit: Position of the unit that all rows are of; None: the file has a column of them.
    """

    name: str
    unit: int | None = None


def merge(job: ShardJob, numbers: Sequence[int]) -> Scanned:
    """The samples of several units in one file, unless it is there.

    Takes memory for the rows of all of them.
    """
    digest = short_digest([[number, job.units[number]] for number in numbers])
    place = job.scratch / f"merged-{digest}.parquet"
    if not place.is_file():
        tables = [_with_unit(_read(scan_file(job, number)), number) for number in numbers]
        _write_sorted(pa.concat_tables(tables), place)
    return Scanned(name=place.name)


def keys_of_shards(job: ShardJob, folder: Place, first: int, last: int) -> Scanned:
    """The keys of some shards of a finished dataset, sorted by order hash, unless they are there.

    Args:
        job: Its seed is the dataset's.
        folder: The dataset.
        first, last: Positions of the first shard and the one behind the last.
    """
    place = job.scratch / f"keys-{short_digest([folder.where, job.seed, first, last])}.parquet"
    if not place.is_file():
        tables = index_shards(folder, range(first, last), columns=["key"])
        keys = [key for table in tables for key in table["key"].to_pylist()]
        order = pa.array([order_hash(job.seed, key) for key in keys], pa.uint64())
        _write_sorted(pa.table([order, pa.array(keys, pa.string())], schema=KEYS), place)
    return Scanned(name=place.name)


def _write_sorted(table: pa.Table, place: Place) -> None:
    with whole_file(place) as path:
        pq.write_table(table.sort_by("order"), path, row_group_size=GROUP_ROWS, compression="zstd")


def _read(place: Place) -> pa.Table:
    with place.open() as file:
        return pq.read_table(file)


def _with_unit(rows: pa.Table, unit: int | None) -> pa.Table:
    if unit is None:
        return rows
    return rows.append_column("unit", pa.repeat(pa.scalar(unit, pa.int32()), rows.num_rows))


def rows_between(job: ShardJob, files: Iterable[Scanned], first: int, last: int) -> pa.Table:
    """The rows of some files whose order hash falls into bins `first` to `last` - 1."""
    shift = 64 - BIN_BITS
    low, high = first << shift, (last << shift) - 1
    tables = [
        _with_unit(rows, file.unit)
        for file in files
        for rows in _groups_between(job.scratch / file.name, low, high)
    ]
    rows = (
        pa.concat_tables(tables)
        if tables
        else SAMPLES.append(pa.field("unit", pa.int32())).empty_table()
    )
    in_range = pc.and_(
        pc.greater_equal(rows["order"], pa.scalar(low, pa.uint64())),
        pc.less_equal(rows["order"], pa.scalar(high, pa.uint64())),
    )
    return rows.filter(in_range)


def _groups_between(place: Place, low: int, high: int) -> Iterator[pa.Table]:
    """Row groups that can hold an order hash from `low` to `high`."""
    with place.open() as file:
        table = pq.ParquetFile(file)
        column = table.schema_arrow.get_field_index("order")
        for group in range(table.num_row_groups):
            told = table.metadata.row_group(group).column(column).statistics
            if told.min <= high and told.max >= low:
                yield table.read_row_group(group)
