"""A finished dataset folder written by hand, without Ray: what the readers' tests read."""

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.manifest import (
    FIELDS,
    INDEX_SCHEMA,
    Manifest,
    ShardRecord,
    write_index,
    write_manifest,
)


def write_dataset(
    folder: Path, samples: Mapping[int, tuple[bytes, int]], *, num_classes: int, per_shard: int
) -> None:
    """Write image files and their labels, by number, as shards, index and manifest."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shards: list[ShardRecord] = []
    numbers = list(samples)
    for start in range(0, len(numbers), per_shard):
        path = folder / f"shard-{len(shards):06d}.tar"
        part = {i: samples[i] for i in numbers[start : start + per_shard]}
        rows += _write_shard(path, len(shards), part)
        shards.append(
            ShardRecord(
                name=path.name,
                samples=len(part),
                bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                version=1,
            )
        )
    write_index(folder, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    write_manifest(
        folder,
        Manifest(
            version=1,
            classes=tuple(f"n{k:08d}" for k in range(num_classes)),
            sources=(),
            seed=0,
            samples=len(samples),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
            skipped=(),
        ),
    )


def _write_shard(
    path: Path, shard: int, samples: Mapping[int, tuple[bytes, int]]
) -> list[dict[str, Any]]:
    """Write samples into one tar; gives their index rows."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (data, label) in samples.items():
            for field, content in zip(FIELDS, (data, str(label).encode(), b"{}"), strict=True):
                member = tarfile.TarInfo(f"key_{i}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    rows: list[dict[str, Any]] = []
    for i, (_, label) in samples.items():
        row: dict[str, Any] = {"key": f"key_{i}", "shard": shard, "label": label}
        for field in FIELDS:
            member = members[f"key_{i}.{field}"]
            row |= {f"{field}_offset": member.offset_data, f"{field}_size": member.size}
        rows.append(row)
    return rows
