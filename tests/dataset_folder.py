"""A finished dataset folder written by hand, without Ray: what the readers' tests read."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.manifest import (
    INDEX_SCHEMA,
    Manifest,
    ShardRecord,
    classes_sha256,
    write_index,
    write_manifest,
)
from pipelines.storage import Place


def write_dataset(
    folder: Path,
    samples: Mapping[int, tuple[bytes, int]],
    *,
    num_classes: int,
    per_shard: int,
    media: str = "jpg",
) -> None:
    """Write files and their labels, by number, as shards, index and manifest.

    Args:
        folder: A new folder.
        samples: Number -> a file's bytes and its label; sample i has the key `key_<i>`. -1 is no
            label.
        num_classes: Classes in the manifest.
        per_shard: Samples in every shard but perhaps the last.
        media: Field of the files; anything but `jpg` is the suffix of videos.
    """
    folder.mkdir(parents=True)
    tables: list[pa.Table] = []
    shards: list[ShardRecord] = []
    numbers = list(samples)
    for start in range(0, len(numbers), per_shard):
        path = folder / f"shard-{len(shards):06d}.tar"
        part = {i: samples[i] for i in numbers[start : start + per_shard]}
        rows = _write_shard(path, len(shards), part, media)
        tables.append(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
        shards.append(
            ShardRecord(
                name=path.name,
                samples=len(part),
                bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                version=1,
            )
        )
    classes = tuple(f"n{k:08d}" for k in range(num_classes))
    write_manifest(
        Place(str(folder)),
        Manifest(
            version=1,
            media="image" if media == "jpg" else "video",
            labelled=all(label >= 0 for _, label in samples.values()),
            classes=classes,
            classes_sha256=classes_sha256(classes),
            sources=(),
            seed=0,
            samples=len(samples),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
            skipped=(),
            index_sha256=write_index(Place(str(folder)), tables),
        ),
    )


def _write_shard(
    path: Path, shard: int, samples: Mapping[int, tuple[bytes, int]], media: str
) -> list[dict[str, Any]]:
    """Write samples into one tar; gives their index rows."""
    contents = {i: _contents(media, *sample) for i, sample in samples.items()}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, fields in contents.items():
            for field, content in fields.items():
                member = tarfile.TarInfo(f"key_{i}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    rows: list[dict[str, Any]] = []
    for i, (data, label) in samples.items():
        row = {"key": f"key_{i}", "shard": shard, "label": label, "media": media}
        row |= {"crc32": zlib.crc32(data), "remark": None}
        for column, field in (("media", media), ("cls", "cls"), ("json", "json")):
            offset, size = places.get(f"key_{i}.{field}", (0, 0))
            row |= {f"{column}_offset": offset, f"{column}_size": size}
        rows.append(row)
    return rows


def _contents(media: str, data: bytes, label: int) -> dict[str, bytes]:
    """The fields of one sample; without a label there is no `cls`."""
    cls = {"cls": str(label).encode()} if label >= 0 else {}
    return {media: data, **cls, "json": b"{}"}
