"""What lies in a dataset folder: `manifest.json` and `index.parquet` beside the shards.

The manifest says which shards belong to the dataset and how to recognise them (sizes,
hashes, counts), which samples were left out and why; it is written last, so a folder
without one is unfinished. The index says where every sample's bytes lie, so that a reader
can seek instead of scanning. Neither knows how shards are made (`shards`) or in which order
they are read (`order`, `stream`).

Index columns, one row per sample in shard order, one row group per shard:

* `key` string; `shard` int32, position in `manifest.shards`; `label` int32, position in
  `manifest.classes`, -1 where the release withholds it;
* `media` string: the field that holds the original bytes (`jpg` for every image, a video's own
  suffix such as `mp4`); `media_offset` and `media_size` int64, bytes in the tar; `crc32` uint32 of
  these bytes;
* `cls_offset`, `cls_size`, `json_offset`, `json_size` int64: the two small fields;
* `remark` string: what is unusual about the sample, null for most.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict

from pipelines.errors import DatasetError
from pipelines.files import as_json, parse_json
from pipelines.storage import Place

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("label", pa.int32()),
        ("media", pa.string()),
        ("media_offset", pa.int64()),
        ("media_size", pa.int64()),
        ("crc32", pa.uint32()),
        ("cls_offset", pa.int64()),
        ("cls_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("remark", pa.string()),
    ]
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
    """One archive, or a part of one, that went in.

    Attributes:
        name: Last part of its path.
        layout: As what it was recognised, see `pipelines.data.sources`.
        part: Which of its samples: "all", a split of the release, or one side of a hash split.
        fingerprint: A hash of the names and sizes of its pieces and of `part`.
        version: Dataset version that it became.
        samples_per_shard: Upper limit that its shards were cut by.
        units: A short hash of each of its pieces' name and size: when the archive has grown, these
            need not be looked at again.
    """

    name: str
    layout: str
    part: str
    fingerprint: str
    version: int
    samples_per_shard: int = 0
    units: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A member of an archive that is not in any shard, and the reason.

    Those that the dataset had already are one entry of "NUMBER samples of ARCHIVE".
    """

    member: str
    reason: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resized:
    """Images were re-encoded on request: short side in pixels (never enlarged), JPEG quality."""

    short_side: int
    quality: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A dataset's table of contents; see the module docstring.

    Attributes:
        version: 1 for a fresh dataset, one more for every archive added later.
        media: What the samples are.
        labelled: False where the release withholds the labels; all are -1 then.
        classes: Class names (of ImageNet: wnids) in label order: sorted, or as a given list has
            them. A label is a position in this list.
        classes_sha256: sha256 of the classes, one a line, so that lists are told apart at a glance.
        names: What people call the classes, in the same order, where the archive tells.
        seed: Seed of the global shuffle at write time.
        samples: Samples in all shards together.
        bytes: Bytes of all shard files together.
        skipped: What was left out, with reasons.
        remarks: What is unusual about samples that were kept -> how many; the index names them.
        resized: How images were re-encoded; None: original bytes.
        index_sha256: sha256 of the index file.
        digest: sha256 of this manifest with this field empty, as `seal` writes it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    version: int
    media: Literal["image", "video"] = "image"
    labelled: bool = True
    classes: tuple[str, ...]
    classes_sha256: str = ""
    names: tuple[str, ...] = ()
    sources: tuple[SourceRecord, ...]
    seed: int
    samples: int
    bytes: int
    shards: tuple[ShardRecord, ...]
    skipped: tuple[SkippedSample, ...]
    remarks: Mapping[str, int] = field(default_factory=dict)
    resized: Resized | None = None
    index_sha256: str = ""
    digest: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class: people's, or the class itself where there is none."""
        return self.names or self.classes


def classes_sha256(classes: Iterable[str]) -> str:
    """A hash of class names in label order: what two datasets must share to share labels."""
    return hashlib.sha256("".join(f"{name}\n" for name in classes).encode()).hexdigest()


def read_manifest(folder: Place) -> Manifest:
    """Read the manifest of a finished dataset folder.

    Raises:
        DatasetError: There is none, it is not one of ours, of another schema version, or was
            changed after it was written.
    """
    place = folder / MANIFEST
    if not place.is_file():
        raise DatasetError(
            f"{folder} is not a finished dataset: it has no {MANIFEST}; "
            f"make it with `mone shard ARCHIVE {folder}`"
        )
    content = place.read_bytes()
    _check_schema_version(place, content)
    manifest = parse_json(content, Manifest, name=str(place), otherwise=_unreadable)
    if seal(manifest).digest != manifest.digest or as_json(manifest) != content:
        raise _unreadable(f"{place} was changed: its digest differs")
    return manifest


def _check_schema_version(place: Place, content: bytes) -> None:
    """Before the fields are read strictly: another version has other fields."""
    found = parse_json(content, dict[str, Any], name=str(place), otherwise=_unreadable)
    if found.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(
            f"{place} has schema version {found.get('schema_version')}, this mone reads "
            f"{SCHEMA_VERSION}; make the shards again with `mone shard`"
        )


def _unreadable(why: str) -> DatasetError:
    return DatasetError(f"{why}; restore it or make the shards again")


def write_manifest(folder: Place, manifest: Manifest) -> None:
    """Seal the manifest and write it so that readers see the old one or the new, never a part."""
    (folder / MANIFEST).write_bytes(as_json(seal(manifest)))


def seal(manifest: Manifest) -> Manifest:
    """The manifest with the digest that its other fields have."""
    bare = replace(manifest, digest="")
    return replace(bare, digest=hashlib.sha256(as_json(bare)).hexdigest())


def read_index(folder: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a dataset folder, or some of its columns, in shard order."""
    place = folder / INDEX
    if not place.is_file():
        raise DatasetError(
            f"{folder} has a manifest but no {INDEX}; restore it or make the shards again"
        )
    with place.open() as file:
        return pq.read_table(file, columns=columns)


def index_shards(
    folder: Place, numbers: Iterable[int], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The index rows of some of a dataset's shards, one shard in memory at a time."""
    with (folder / INDEX).open() as file:
        index = pq.ParquetFile(file)
        for number in numbers:
            yield index.read_row_group(number, columns=columns)


def write_index(folder: Place, shards: Iterable[pa.Table]) -> str:
    """Write the index from each shard's rows in turn, whole or not at all.

    One shard is in memory at a time.

    Args:
        folder: The dataset folder.
        shards: Rows of `INDEX_SCHEMA`, a table per shard, in the manifest's order.

    Returns:
        The file's sha256, for the manifest.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / INDEX
        with pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd") as writer:
            for rows in shards:
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (folder / INDEX).put(path)
    return digest
