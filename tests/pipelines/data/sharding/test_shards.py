"""Archives into shards on a real Ray: exact bytes, restarts, additions, splits."""

import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.manifest import (
    Resized,
    classes_sha256,
    read_index,
    read_manifest,
)
from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.shards import (
    ShardingReport,
    write_parts,
    write_shards,
)
from pipelines.data.sources.base import Listed, Source
from pipelines.data.verify import verify
from pipelines.errors import DatasetError
from tests.pipelines.data.sharding.sharded import (
    contents,
    folder,
    keys,
    members,
    place,
    samples,
    source,
)

pytestmark = pytest.mark.usefixtures("ray_session")

MakeArchive = Callable[..., Path]
WriteTar = Callable[..., Path]
Jpeg = Callable[[int], bytes]

# Writes a dataset and dies at a moment of choice: the n-th time that a file is put in place.
CHILD = """
import os, signal, sys
from pathlib import Path
from cluster.session import ray_session
from pipelines.data.sharding import finish
from pipelines.data.sharding.shards import write_parts
from pipelines.data.sources import find_source
from pipelines.storage import Place

archive, out, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def watch(stage, done, total):
    if moment == f"{stage} {done}":
        die()

if moment == "manifest":
    finish.write_manifest = die
with ray_session(num_cpus=1):
    write_parts(
        find_source(Place(archive)), Place(out), val_fraction=0.2, samples_per_shard=4,
        progress=watch,
    )
"""


def test_plain_webdataset_reads_every_image_once_and_unchanged(
    made: ShardingReport, archive: Path
) -> None:
    read = samples(made)
    assert len(read) == made.samples == 60
    assert {str(sample["__key__"]): sample["jpg"] for sample in read} == members(archive)
    for sample in read:
        key = str(sample["__key__"])
        wnid = key.split("_")[0]
        assert sample["cls"] == str(made.manifest.classes.index(wnid)).encode()
        assert json.loads(sample["json"]) == {"class": wnid, "member": f"{wnid}.tar/{key}.JPEG"}


def test_the_manifest_adds_up_and_nothing_else_is_left(made: ShardingReport) -> None:
    manifest = made.manifest
    assert manifest == read_manifest(made.folder)
    assert manifest.classes == ("n00000000", "n00000001", "n00000002")
    assert manifest.classes_sha256 == classes_sha256(manifest.classes)
    assert [shard.samples for shard in manifest.shards] == [20, 20, 20]
    assert manifest.bytes == sum((folder(made) / s.name).stat().st_size for s in manifest.shards)
    assert (manifest.version, manifest.samples, manifest.skipped) == (1, 60, ())
    assert (manifest.media, manifest.labelled, manifest.resized) == ("image", True, None)
    assert [(old.name, old.layout) for old in manifest.sources] == [("archive", "imagenet21k")]
    assert set(contents(folder(made))) == {
        "manifest.json",
        "index.parquet",
        *(shard.name for shard in manifest.shards),
    }
    assert made.empty_classes == 0
    assert verify(made.folder) == []


def test_classes_are_mixed_in_every_shard(made: ShardingReport) -> None:
    index = read_index(made.folder).to_pylist()
    for number in range(3):
        assert {row["label"] for row in index if row["shard"] == number} == {0, 1, 2}


def test_headers_tell_nothing_of_machine_or_day(made: ShardingReport) -> None:
    with tarfile.open(folder(made) / "shard-000000.tar") as tar:
        infos = tar.getmembers()
    assert [info.name.split(".")[1] for info in infos[:4]] == ["jpg", "cls", "json", "jpg"]
    for info in infos:
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
        assert info.mode == 0o644


def test_a_cluster_that_has_no_cpus_yet_is_given_its_work(
    tmp_path: Path, archive: Path, made: ShardingReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.sharding.shards.cluster_cpus", lambda: 0)
    report = write_shards(source(archive), place(tmp_path / "o"), samples_per_shard=25)
    assert contents(folder(report)) == contents(folder(made))


def test_another_seed_gives_another_order_of_the_same_samples(
    tmp_path: Path, archive: Path, made: ShardingReport
) -> None:
    other = write_shards(source(archive), place(tmp_path / "o"), seed=1, samples_per_shard=25)
    assert keys(made) != keys(other)
    assert sorted(keys(made)) == sorted(keys(other))


def test_a_second_run_does_nothing(made: ShardingReport, archive: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder(made).iterdir()}
    report = write_shards(source(archive), made.folder, samples_per_shard=25)
    assert report.did_nothing
    assert report.samples == 0
    assert report.manifest == made.manifest
    assert before == {path: path.stat().st_mtime_ns for path in folder(made).iterdir()}


def inodes(out: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_ino for path in out.rglob(pattern)}


@pytest.mark.parametrize(
    ("moment", "scans", "shards"),
    [("scan 2", 2, 0), ("write 5", 6, 5), ("manifest", 6, 15)],
)
def test_a_killed_run_is_continued_to_the_bytes_of_an_unbroken_one_on_any_number_of_cpus(
    tmp_path: Path, archive: Path, moment: str, scans: int, shards: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(archive), str(killed), moment],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not list(killed.rglob("manifest.json"))
    scanned = inodes(killed / UNFINISHED, "*.parquet")
    written = inodes(killed, "shard-*.tar")
    assert len(scanned) >= scans
    assert len(written) >= shards

    seen = {}

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "write" and done == 1:
            seen.update(inodes(killed / UNFINISHED, "*.parquet"))

    reports = write_parts(
        source(archive), place(killed), val_fraction=0.2, samples_per_shard=4, progress=watch
    )
    assert {path: seen[path] for path in scanned} == scanned
    kept = inodes(killed, "shard-*.tar")
    assert sum(written[path] == kept[path] for path in written) >= shards
    assert sum(report.kept_shards for report in reports) >= shards
    write_parts(source(archive), place(whole), val_fraction=0.2, samples_per_shard=4)
    assert contents(killed) == contents(whole)


def test_leftovers_of_another_plan_are_made_anew(
    tmp_path: Path, archive: Path, made: ShardingReport
) -> None:
    out = tmp_path / "out"
    write_shards(source(archive), place(out), seed=3, samples_per_shard=4)
    (out / "manifest.json").unlink()
    (out / UNFINISHED).mkdir()
    (out / UNFINISHED / ".shard-000000.tar.77.tmp").write_bytes(b"half")
    (out / ".shard-000000.tar.78.tmp").write_bytes(b"half")
    report = write_shards(source(archive), place(out), samples_per_shard=25)
    assert report.kept_shards == 0
    assert contents(out) == contents(folder(made))


def test_a_split_by_hash_holds_out_the_same_samples_for_good(
    tmp_path: Path, archive: Path, made: ShardingReport
) -> None:
    out = place(tmp_path / "out")
    train, val = write_parts(source(archive), out, val_fraction=0.2)
    assert (folder(train).name, folder(val).name) == ("train", "val")
    assert sorted(keys(train) + keys(val)) == sorted(keys(made))
    assert 4 <= val.samples <= 20
    assert train.manifest.classes == val.manifest.classes == made.manifest.classes
    alone = write_shards(source(archive), place(tmp_path / "a"), part="val", val_fraction=0.2)
    assert contents(folder(alone)) == contents(folder(val))
    again = write_parts(source(archive), out, val_fraction=0.2)
    assert [report.did_nothing for report in again] == [True, True]
    assert not (tmp_path / "out" / UNFINISHED).exists()


def with_lists(archive: Path) -> Source:
    """The archive as a release with lists: two splits, one of them without labels."""
    listed = {
        f"n{c:08d}_{n}": Listed(class_name=f"class {c}", split="train")
        if n < 15
        else Listed(class_name=None, split="test")
        for c in range(3)
        for n in range(20)
    }
    listed |= {"gone": Listed(class_name="class 1", split="train")}
    del listed["n00000002_3"]
    found = source(archive)
    units = tuple(replace(unit, class_name=None) for unit in found.units)
    classes = ("class 2", "class 0", "class 1", "class 9")
    return replace(found, units=units, listed=listed, splits=("train", "test"), classes=classes)


def test_a_release_s_splits_become_folders_and_withheld_labels_stay_so(
    tmp_path: Path, archive: Path
) -> None:
    train, test = write_parts(with_lists(archive), place(tmp_path / "out"), max_bad_fraction=0.1)
    assert (folder(train).name, folder(test).name) == ("train", "test")
    assert (train.samples, test.samples) == (44, 15)
    assert (
        train.manifest.classes
        == test.manifest.classes
        == (
            "class 2",
            "class 0",
            "class 1",
            "class 9",
        )
    )
    assert (train.manifest.labelled, test.manifest.labelled) == (True, False)
    assert (train.empty_classes, test.empty_classes) == (1, 0)
    told = [(skipped.member, skipped.reason) for skipped in train.skipped]
    assert told == [
        ("n00000002.tar/n00000002_3.JPEG", "is not in the release's lists"),
        ("gone", "has no file"),
    ]
    assert test.skipped == ()
    assert set(read_index(train.folder)["label"].to_pylist()) == {0, 1, 2}
    assert set(read_index(test.folder)["label"].to_pylist()) == {-1}
    assert all("cls" not in sample for sample in samples(test))
    assert all("cls" in sample for sample in samples(train))
    assert verify(train.folder) == verify(test.folder) == []


def test_bad_members_are_skipped_counted_and_named(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(5)}
    files |= {
        "n01_1.jpg": jpeg(12),
        "n01_9.JPEG": jpeg(9)[:-40],
        "notes.txt": b"hello",
    }
    write_tar(tmp_path / "raw/n01.tar", files)
    report = write_shards(source(tmp_path / "raw"), place(tmp_path / "o"), max_bad_fraction=0.4)
    told = [(skipped.member, skipped.reason.split(":")[0]) for skipped in report.manifest.skipped]
    assert [member for member, _ in told] == [
        "n01.tar/n01_1.jpg",
        "n01.tar/n01_9.JPEG",
        "n01.tar/notes.txt",
    ]
    assert told[0][1] == "has the key of an earlier member"
    assert report.skipped == report.manifest.skipped
    assert sorted(keys(report)) == ["n01_0", "n01_1", "n01_2", "n01_3", "n01_4"]
    first = {str(sample["__key__"]): sample["jpg"] for sample in samples(report)}
    assert first["n01_1"] == jpeg(1)


def test_remarks_are_counted_and_stand_in_the_index(
    tmp_path: Path, write_tar: WriteTar, noise: Callable[..., object], encode: Callable[..., bytes]
) -> None:
    files = {f"n01_{n}.JPEG": encode(noise(40, 40, mode="L")) for n in range(3)}
    write_tar(tmp_path / "raw/n01.tar", files | {"n01_7.JPEG": encode(noise(40, 40))})
    report = write_shards(source(tmp_path / "raw"), place(tmp_path / "out"))
    assert report.manifest.remarks == {"is greyscale": 3}
    remarks = read_index(report.folder, ["key", "remark"]).to_pylist()
    assert sorted(row["key"] for row in remarks if row["remark"]) == ["n01_0", "n01_1", "n01_2"]


def test_images_are_resized_only_on_request(tmp_path: Path, archive: Path) -> None:
    resized = Resized(short_side=8, quality=75)
    report = write_shards(source(archive), place(tmp_path / "out"), resized=resized)
    assert report.manifest.resized == resized
    for sample in samples(report):
        told = json.loads(sample["json"])
        assert told["resized"] == {"from": [16, 16], "to": [8, 8], "quality": 75}
    assert verify(report.folder) == []
    with pytest.raises(DatasetError, match=r"other settings \(resize: others than now\)"):
        write_shards(source(archive), report.folder)


def test_a_list_of_classes_decides_the_labels(tmp_path: Path, archive: Path) -> None:
    classes = ("z", "n00000002", "n00000001", "n00000000")
    report = write_shards(source(archive), place(tmp_path / "out"), classes=classes)
    assert report.manifest.classes == classes
    assert report.empty_classes == 1
    rows = read_index(report.folder).to_pylist()
    assert {(row["key"][:9], row["label"]) for row in rows} == {
        ("n00000000", 3),
        ("n00000001", 2),
        ("n00000002", 1),
    }


def test_a_synset_without_images_keeps_its_label(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    write_tar(tmp_path / "raw/n01.tar", {})
    write_tar(tmp_path / "raw/n02.tar", {"n02_1.JPEG": jpeg(1)})
    report = write_shards(source(tmp_path / "raw"), place(tmp_path / "out"))
    assert report.manifest.classes == ("n01", "n02")
    assert report.empty_classes == 1
    assert read_index(report.folder)["label"].to_pylist() == [1]


def test_merged_scan_files_give_the_same_bytes(
    tmp_path: Path, archive: Path, made: ShardingReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.sharding.making.MOST_OPENS", 0)
    monkeypatch.setattr("pipelines.data.sharding.making.MERGE_ROWS", 45)
    report = write_shards(source(archive), place(tmp_path / "out"), samples_per_shard=25)
    assert contents(folder(report)) == contents(folder(made))
