"""Planned shards into files: one tar at a time, plain code that a Ray task, or a test, calls.

A finished shard leaves a side file in `.unfinished/` with the hash of its plan, its record and
its index rows. That is how an interrupted run is continued and what index and manifest are made
from in the end (`shards`). A shard is written there too, under a temporary name, flushed to disk
and renamed into the dataset folder: it is whole or absent.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.archive import BLOCK
from pipelines.data.manifest import FIELDS, INDEX_SCHEMA, ShardRecord
from pipelines.data.plan import PlannedShard, ShardJob
from pipelines.files import write_atomically

UNFINISHED = ".unfinished"
SHARD_NAME = re.compile(r"shard-(\d{6,})\.tar")


def write_shard(job: ShardJob, shard: dict[str, Any]) -> None:
    """Gather a shard's members from their tars; its side file then says that it is whole.

    Args:
        job: The dataset version that the shard belongs to.
        shard: One row of `PlannedShard.work` as Python values.

    Raises:
        OSError: A tar cannot be read or the shard not written; nothing half-made is left.
    """
    temporary = job.out / UNFINISHED / f"{shard['name']}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            writer = _ShardWriter(file)
            rows = [_add_sample(job, writer, shard["number"], row) for row in shard["members"]]
            writer.finish()
        temporary.replace(job.out / shard["name"])
    finally:
        temporary.unlink(missing_ok=True)
    record = ShardRecord(
        name=shard["name"],
        samples=len(rows),
        bytes=writer.size,
        sha256=writer.sha256.hexdigest(),
        version=job.source.version,
    )
    _write_side_file(job, shard["digest"], record, pa.Table.from_pylist(rows, INDEX_SCHEMA))


def _add_sample(
    job: ShardJob, writer: "_ShardWriter", number: int, member: dict[str, Any]
) -> dict[str, Any]:
    """Write one sample's fields; returns its index row."""
    row = {"key": member["key"], "shard": number, "label": member["label"]}
    for field, data in zip(FIELDS, _contents(job, member), strict=True):
        row[f"{field}_offset"] = writer.add(f"{member['key']}.{field}", data)
        row[f"{field}_size"] = len(data)
    return row


def _contents(job: ShardJob, member: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """What goes into `jpg`, `cls` and `json`."""
    tar = job.tars[member["tar"]]
    with tar.open("rb", buffering=0) as file:
        file.seek(member["offset"])
        image = file.read(member["size"])
    if len(image) != member["size"]:
        raise OSError(f"{tar} became shorter while it was read")
    origin = {"member": job.member_name(member), "synset": tar.stem}
    told = json.dumps(origin, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return image, str(member["label"]).encode(), told.encode()


class _ShardWriter:
    """Writes a tar, counting and hashing; nothing of the machine or the day gets into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Add a file; returns the byte where its data begin."""
        info = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
        info.size = len(data)
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def finish(self) -> None:
        """Add the end-of-archive blocks and flush everything to disk."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def clear_all_but_whole(job: ShardJob, plan: list[PlannedShard]) -> list[PlannedShard]:
    """Remove what an interrupted run left half-made or made by another plan.

    Returns:
        The shards that are still to be written.
    """
    whole = {shard.name for shard in plan if _is_whole(job, shard)}
    for path in job.out.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        if match and int(match[1]) >= job.first_shard and path.name not in whole:
            path.unlink()
    for path in (job.out / UNFINISHED).iterdir():
        if path.name.removesuffix(".parquet") not in whole:
            path.unlink(missing_ok=True)  # a killed run's last task may be renaming it just now
    return [shard for shard in plan if shard.name not in whole]


def _is_whole(job: ShardJob, shard: PlannedShard) -> bool:
    path = job.out / shard.name
    if not (path.is_file() and _side_file(job, shard.name).is_file()):
        return False
    digest, record, _ = read_side_file(job, shard.name)
    return digest == shard.digest and path.stat().st_size == record.bytes


def read_side_file(job: ShardJob, shard_name: str) -> tuple[str, ShardRecord, pa.Table]:
    """A finished shard's plan hash, record and index rows."""
    rows = pq.read_table(_side_file(job, shard_name))
    told = rows.schema.metadata
    record = ShardRecord(**json.loads(told[b"record"]))
    return told[b"digest"].decode(), record, rows.replace_schema_metadata()


def _write_side_file(job: ShardJob, digest: str, record: ShardRecord, rows: pa.Table) -> None:
    buffer = io.BytesIO()
    told = {"digest": digest, "record": json.dumps(asdict(record))}
    pq.write_table(rows.replace_schema_metadata(told), buffer)
    write_atomically(_side_file(job, record.name), buffer.getvalue())


def _side_file(job: ShardJob, shard_name: str) -> Path:
    return job.out / UNFINISHED / f"{shard_name}.parquet"
