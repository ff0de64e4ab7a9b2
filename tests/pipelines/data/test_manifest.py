"""What lies beside the shards: read as it was written, or refused with the reason."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.manifest import (
    INDEX_SCHEMA,
    Manifest,
    Resized,
    ShardRecord,
    SkippedSample,
    SourceRecord,
    classes_sha256,
    index_shards,
    read_index,
    read_manifest,
    seal,
    write_index,
    write_manifest,
)
from pipelines.errors import DatasetError
from pipelines.storage import Place

MANIFEST = Manifest(
    version=2,
    media="video",
    labelled=False,
    classes=("n01", "n02"),
    classes_sha256=classes_sha256(("n01", "n02")),
    names=("tench", "goldfish"),
    sources=(
        SourceRecord(
            name="raw",
            layout="folders",
            part="all",
            fingerprint="f",
            version=1,
            samples_per_shard=4096,
            units=("a", "b"),
        ),
    ),
    seed=3,
    samples=2,
    bytes=4096,
    shards=(ShardRecord(name="shard-000000.tar", samples=2, bytes=4096, sha256="s", version=1),),
    skipped=(SkippedSample(member="n01.tar/é.JPEG", reason="is empty", version=2),),
    remarks={"is CMYK": 1},
    resized=Resized(short_side=384, quality=90),
    index_sha256="i",
)


def rows(*keys: str, shard: int = 0) -> pa.Table:
    values = [
        {name: n for n, name in enumerate(INDEX_SCHEMA.names)}
        | {"key": key, "shard": shard, "media": "jpg", "remark": None}
        for key in keys
    ]
    return pa.Table.from_pylist(values, INDEX_SCHEMA)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_is_read_as_it_was_written_and_sealed(tmp_path: Path) -> None:
    write_manifest(Place(str(tmp_path)), MANIFEST)
    read = read_manifest(Place(str(tmp_path)))
    assert read == seal(MANIFEST)
    assert len(read.digest) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_people_s_names_stand_in_for_classes_where_there_are_any() -> None:
    assert MANIFEST.class_names == ("tench", "goldfish")
    assert replace(MANIFEST, names=()).class_names == ("n01", "n02")


def test_class_lists_are_told_apart_by_names_and_order() -> None:
    lists = [("a", "b"), ("b", "a"), ("ab",), ("a\nb",), ()]
    assert len({classes_sha256(each) for each in lists}) == 4  # no class name holds a line break
    assert classes_sha256(("a", "b")) == hashlib.sha256(b"a\nb\n").hexdigest()


def test_an_index_has_a_row_group_per_shard_and_a_hash(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    shards = [rows("a", "b"), rows("c", shard=1)]
    digest = write_index(place, iter(shards))
    content = (tmp_path / "index.parquet").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    assert read_index(place).equals(pa.concat_tables(shards))
    assert read_index(place, ["key"])["key"].to_pylist() == ["a", "b", "c"]
    assert pq.ParquetFile(tmp_path / "index.parquet").num_row_groups == 2
    assert [table["key"].to_pylist() for table in index_shards(place, [1, 0])] == [
        ["c"],
        ["a", "b"],
    ]
    assert write_index(place, iter(shards)) == digest


def test_an_index_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    write_index(place, [rows("a")])
    before = (tmp_path / "index.parquet").read_bytes()

    def failing():
        yield rows("b")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_index(place, failing())
    assert (tmp_path / "index.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]


def test_a_folder_without_manifest_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a finished dataset: it has no manifest\.json"):
        read_manifest(Place(str(tmp_path)))


def test_a_missing_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has a manifest but no index\.parquet; restore it"):
        read_index(Place(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": "two"}, "samples: Input should be a valid integer"),
        ({"colour": 1}, "colour: Unexpected keyword argument"),
        ({"shards": [{"name": "x"}]}, r"shards\.0\.samples: "),
        ({"schema_version": 1}, "has schema version 1, this mone reads 2; make the shards again"),
        ({"seed": 4}, "was changed: its digest differs; restore it or make the shards again"),
        ({"digest": ""}, "was changed: its digest differs"),
        ({}, "was changed: its digest differs"),  # other blanks
    ],
)
def test_a_manifest_that_does_not_fit_names_the_field(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    write_manifest(Place(str(tmp_path)), MANIFEST)
    edit(tmp_path, **changes)
    with pytest.raises(DatasetError, match=told):
        read_manifest(Place(str(tmp_path)))


def test_a_manifest_that_is_no_json_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cannot be read: the file: .*; restore it") as caught:
        read_manifest(Place(str(tmp_path)))
    assert "\n" not in str(caught.value)
