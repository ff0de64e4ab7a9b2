"""Any change to a dataset is found and named."""

import argparse
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.commands.verify import datasets, main
from pipelines.data.manifest import index_shards, read_manifest, write_index, write_manifest
from pipelines.data.verify import _Check, verify
from pipelines.errors import DatasetError
from pipelines.storage import Place


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], jpeg: Callable[[int], bytes]) -> Path:
    """Twelve samples in shards of five."""
    return make_dataset([jpeg(n) for n in range(12)])


def problems(folder: Path) -> list[str]:
    return verify(Place(str(folder)))


def test_a_whole_dataset_has_no_problems_and_every_byte_of_it_was_read(dataset: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(Place(str(dataset)), lambda done, total: seen.append((done, total))) == []
    read = sum(path.stat().st_size for path in dataset.iterdir() if path.name != "manifest.json")
    assert seen[-1] == (read, read)


@pytest.mark.parametrize(
    ("field", "what"), [("media", "crc"), ("cls", "class"), ("media", "header")]
)
def test_a_changed_sample_is_named(dataset: Path, field: str, what: str) -> None:
    (rows,) = index_shards(Place(str(dataset)), [1])
    row = rows.to_pylist()[2]
    at = row[f"{field}_offset"] - (500 if what == "header" else 0)
    path = dataset / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert problems(dataset) == [
        "shard-000001.tar was changed: its sha256 differs (sample 'key_7')"
    ]


def test_a_change_outside_of_samples_is_told_so(dataset: Path) -> None:
    path = dataset / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = problems(dataset)
    assert problem.endswith("its sha256 differs (in no sample's image, video, class or name)")


def test_many_changed_samples_are_counted(dataset: Path) -> None:
    path = dataset / "shard-000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    (problem,) = problems(dataset)
    assert problem.endswith("(sample 'key_5', 'key_6', 'key_7' and 2 more)")


@pytest.mark.parametrize("name", ["shard-000002.tar", "index.parquet", "manifest.json"])
def test_no_flipped_byte_goes_unnoticed(dataset: Path, name: str) -> None:
    path = dataset / name
    content = path.read_bytes()
    step = len(content) // 150
    for at in range(1, len(content), step):
        changed = bytearray(content)
        changed[at] ^= (0x01, 0x20, 0x29)[at % 3]  # also a blank into another kind of blank
        path.write_bytes(changed)
        try:
            (problem,) = problems(dataset)
        except DatasetError as error:
            assert name == "manifest.json", at
            problem = str(error)
        assert name in problem, at


def test_a_manifest_of_other_blanks_was_changed(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(DatasetError, match=r"manifest\.json was changed: its digest differs"):
        problems(dataset)


def test_missing_shortened_and_foreign_shards_are_all_named(dataset: Path) -> None:
    (dataset / "shard-000000.tar").unlink()
    path = dataset / "shard-000002.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    (dataset / "shard-000009.tar").write_bytes(b"")
    assert problems(dataset) == [
        "shard-000000.tar is missing",
        f"shard-000002.tar has {size - 512} bytes, manifest.json says {size}",
        "shard-000009.tar is not in manifest.json",
    ]


def test_an_index_of_other_rows_is_found(dataset: Path) -> None:
    place = Place(str(dataset))
    write_index(place, list(index_shards(place, [0, 1])))
    assert problems(dataset) == ["index.parquet was changed: its sha256 differs"]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_broken_index_is_found_beside_a_broken_shard(
    dataset: Path, content: bytes | None
) -> None:
    shard = dataset / "shard-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    if content is None:
        (dataset / "index.parquet").unlink()
    else:
        (dataset / "index.parquet").write_bytes(content)
    what = "is missing" if content is None else "was changed: its sha256 differs"
    assert problems(dataset) == [
        "shard-000000.tar was changed: its sha256 differs",
        f"index.parquet {what}",
    ]


def test_a_shard_that_cannot_be_read_is_told_beside_the_others(dataset: Path) -> None:
    manifest = read_manifest(Place(str(dataset)))
    unread, changed, whole = manifest.shards
    # A file that can be opened and not read, as on a disk with a bad sector.
    (dataset / unread.name).unlink()
    (dataset / unread.name).symlink_to("/proc/self/mem")
    shards = (replace(unread, bytes=0), changed, whole)
    write_manifest(Place(str(dataset)), replace(manifest, shards=shards))
    path = dataset / changed.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    first, second = problems(dataset)
    assert re.fullmatch(
        r"shard-000000\.tar cannot be read: .*Input/output error; mend that .*", first
    )
    assert second.startswith("shard-000001.tar was changed: its sha256 differs (in no sample's")


def test_a_shard_that_cannot_be_read_again_is_told_without_its_samples(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset / "shard-000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    files = _Check.file

    def file(check: _Check, name: str) -> str | None:
        problem = files(check, name)
        if name == path.name:
            path.unlink()
        return problem

    monkeypatch.setattr(_Check, "file", file)
    assert problems(dataset) == ["shard-000001.tar was changed: its sha256 differs"]


@pytest.mark.parametrize("left", ["shard-000000.tar", "index.parquet", ".unfinished"])
def test_a_part_that_lost_its_manifest_is_told_beside_the_whole_ones(
    dataset: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    val = dataset.parent / "val"
    shutil.copytree(dataset, val)
    (val / ".unfinished").mkdir()
    for path in list(val.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (dataset.parent / "notes").mkdir()  # nobody's business
    message = rf"val: has no manifest\.json, though it holds {re.escape(left)}; restore it or make"
    with pytest.raises(DatasetError, match=message):
        main(argparse.ArgumentParser(), [str(dataset.parent)])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("12 samples in 3 shards are whole")
    assert told[1].startswith(f"{val}: has no manifest.json")


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a finished dataset"):
        problems(tmp_path)


def test_the_parts_of_a_folder_are_found(dataset: Path) -> None:
    assert datasets(Place(str(dataset.parent))) == [Place(str(dataset))]
    assert datasets(Place(str(dataset))) == [Place(str(dataset))]
    absent = Place(str(dataset / "absent"))
    assert datasets(absent) == [absent]
    assert read_manifest(Place(str(dataset))).samples == 12
