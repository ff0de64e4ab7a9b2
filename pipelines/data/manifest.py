"""What lies in a dataset folder: `manifest.json` and `index.parquet` beside the shards.

The manifest says which shards belong to the dataset and how to recognise them (sizes,
hashes, counts), which samples were left out and why; it is written last, so a folder
without one is unfinished. The index says where every sample's bytes lie, so that a reader
can seek instead of scanning. Neither knows how shards are made (`shards`) or in which order
they are read (`order`, `stream`).

Index columns, one row per sample in shard order: `key` string, `shard` int32 (position in
`manifest.shards`), `label` int32 (position in `manifest.classes`), and per field
(`jpg`, `cls`, `json`) `<field>_offset` int64 and `<field>_size` int64: bytes in the tar.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict

from pipelines.errors import DatasetError
from pipelines.files import read_json, write_atomically, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
FIELDS = ("jpg", "cls", "json")
INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.int32()), ("label", pa.int32())]
    + [(f"{field}_{what}", pa.int64()) for field in FIELDS for what in ("offset", "size")]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard as it was written: `bytes` is the file's size, `version` the dataset version."""

    name: str
    samples: int
    bytes: int
    sha256: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """One archive that went in: `fingerprint` is a hash of its tars' names and sizes."""

    name: str
    fingerprint: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A member of an archive that is not in any shard, and the reason."""

    member: str
    reason: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A dataset's table of contents; see the module docstring.

    Attributes:
        version: 1 for a fresh dataset, one more for every archive added later.
        classes: Synset names in sorted order; a label is a position in this list.
        names: What people call the classes, in the same order, where the archive tells.
        seed: Seed of the global shuffle at write time.
        samples: Samples in all shards together.
        bytes: Bytes of all shard files together.
        skipped: What was left out, named, with reasons.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    version: int
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()
    sources: tuple[SourceRecord, ...]
    seed: int
    samples: int
    bytes: int
    shards: tuple[ShardRecord, ...]
    skipped: tuple[SkippedSample, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class: people's, or the synset's where there is none."""
        return self.names or self.classes


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished dataset folder.

    Raises:
        DatasetError: There is none, it is not one of ours, or it is of another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DatasetError(
            f"{folder} is not a finished dataset: it has no {MANIFEST}; "
            f"make it with `mone shard ARCHIVE {folder}`"
        )
    manifest = read_json(
        path,
        Manifest,
        otherwise=lambda why: DatasetError(f"{why}; restore it or make the shards again"),
    )
    if manifest.schema_version != SCHEMA_VERSION:
        raise DatasetError(
            f"{path} has schema version {manifest.schema_version}, this mone reads "
            f"{SCHEMA_VERSION}; make the shards again with `mone shard`"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest so that readers see the old one or the new one, never a part."""
    write_json(folder / MANIFEST, manifest)


def read_index(folder: Path) -> pa.Table:
    """The index of a dataset folder, in shard order; columns as in the module docstring."""
    path = folder / INDEX
    if not path.is_file():
        raise DatasetError(
            f"{folder} has a manifest but no {INDEX}; restore it or make the shards again"
        )
    return pq.read_table(path, schema=INDEX_SCHEMA)


def write_index(folder: Path, table: pa.Table) -> None:
    """Write the index, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(folder / INDEX, sink.getvalue().to_pybytes())
