"""What lies beside the shards: read as it was written, or refused with the reason."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.manifest import (
    INDEX_SCHEMA,
    Manifest,
    ShardRecord,
    SkippedSample,
    SourceRecord,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from pipelines.errors import DatasetError

MANIFEST = Manifest(
    version=2,
    classes=("n01", "n02"),
    sources=(SourceRecord(name="raw", fingerprint="f", version=1),),
    seed=3,
    samples=2,
    bytes=4096,
    shards=(ShardRecord(name="shard-000000.tar", samples=2, bytes=4096, sha256="s", version=1),),
    skipped=(SkippedSample(member="n01.tar/é.JPEG", reason="is empty", version=2),),
)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = {name: n for n, name in enumerate(INDEX_SCHEMA.names)} | {"key": "n01_1"}
    table = pa.Table.from_pylist([row], INDEX_SCHEMA)
    write_index(tmp_path, table)
    assert read_index(tmp_path).equals(table)


def test_a_folder_without_manifest_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a finished dataset: it has no manifest\.json"):
        read_manifest(tmp_path)


def test_a_missing_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has a manifest but no index\.parquet; restore it"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": "two"}, "samples: Input should be a valid integer"),
        ({"colour": 1}, "colour: Unexpected keyword argument"),
        ({"shards": [{"name": "x"}]}, r"shards\.0\.samples: "),
        ({"schema_version": 9}, "has schema version 9, this mone reads 1; make the shards again"),
    ],
)
def test_a_manifest_that_does_not_fit_names_the_field(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    write_manifest(tmp_path, MANIFEST)
    edit(tmp_path, **changes)
    with pytest.raises(DatasetError, match=told):
        read_manifest(tmp_path)


def test_a_manifest_that_is_no_json_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cannot be read: the file: .*; restore it") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
