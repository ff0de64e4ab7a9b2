"""Datasets of a few small images, written with plain `tarfile`: no Ray, no `mone shard`."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.manifest import (
    FIELDS,
    INDEX_SCHEMA,
    Manifest,
    ShardRecord,
    write_index,
    write_manifest,
)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """Makes an image of smooth colours, another one for every seed."""

    def make(width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height)).convert(mode)

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Makes the bytes of an image file."""

    def make(image: Image.Image, kind: str = "JPEG") -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes image files as a finished dataset; every sample is a class of its own."""

    def make(files: Sequence[bytes], *, per_shard: int = 5, name: str = "train") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows: list[dict[str, object]] = []
        shards = []
        for number, start in enumerate(range(0, len(files), per_shard)):
            path = folder / f"shard-{number:06d}.tar"
            part = range(start, min(start + per_shard, len(files)))
            rows += write_shard(path, number, {i: files[i] for i in part})
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
                classes=tuple(f"n{i:08d}" for i in range(len(files))),
                sources=(),
                seed=0,
                samples=len(files),
                bytes=sum(shard.bytes for shard in shards),
                shards=tuple(shards),
                skipped=(),
            ),
        )
        return folder

    return make


def write_shard(path: Path, number: int, files: dict[int, bytes]) -> list[dict[str, object]]:
    """Write samples into one tar; returns their index rows."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, data in files.items():
            for field, content in zip(FIELDS, (data, str(i).encode(), b"{}"), strict=True):
                member = tarfile.TarInfo(f"key_{i}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    rows: list[dict[str, object]] = []
    for i in files:
        row: dict[str, object] = {"key": f"key_{i}", "shard": number, "label": i}
        for field in FIELDS:
            member = members[f"key_{i}.{field}"]
            row |= {f"{field}_offset": member.offset_data, f"{field}_size": member.size}
        rows.append(row)
    return rows
