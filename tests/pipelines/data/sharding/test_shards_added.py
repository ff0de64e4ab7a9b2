"""Archives added to a finished dataset: new shards, old ones untouched."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipelines.config import DataConfig, RunConfig
from pipelines.data.manifest import index_shards, read_index, read_manifest
from pipelines.data.sharding.shards import (
    add_archive,
    add_parts,
    write_parts,
    write_shards,
)
from pipelines.data.verify import verify
from pipelines.errors import DatasetError, RunError
from pipelines.retrain import run_retraining
from pipelines.terminal import Terminal
from tests.pipelines.data.sharding.sharded import contents, keys, place, source

pytestmark = pytest.mark.usefixtures("ray_session")

MakeArchive = Callable[..., Path]
WriteTar = Callable[..., Path]
Jpeg = Callable[[int], bytes]


def test_adding_an_archive_leaves_old_shards_untouched(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    before = contents(dataset)
    old = read_index(place(dataset))
    base = read_manifest(place(dataset))
    new = make_archive(tmp_path / "new", classes=2, images=15, first=10)  # 10 of each are known
    report = add_archive(source(new), place(dataset))

    assert (report.samples, report.known, report.skipped) == (10, 20, ())
    manifest = read_manifest(place(dataset))
    assert manifest == report.manifest
    assert (manifest.version, manifest.samples, manifest.classes) == (2, 70, base.classes)
    assert manifest.shards[:3] == base.shards
    assert [(shard.name, shard.version) for shard in manifest.shards[3:]] == [
        ("shard-000003.tar", 2)
    ]
    assert [record.version for record in manifest.sources] == [1, 2]
    after = contents(dataset)
    assert all(after[shard.name] == before[shard.name] for shard in base.shards)
    assert pa.concat_tables(index_shards(place(dataset), range(3))).equals(old)
    assert verify(place(dataset)) == []


def test_samples_that_a_dataset_has_are_one_entry_of_its_manifest_however_often_they_come(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    raw, out = tmp_path / "raw", place(tmp_path / "out")
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(8)}
    write_tar(raw / "n01.tar", files)
    write_shards(source(raw), out)
    for n in (8, 9):
        files |= {f"n01_{n}.JPEG": jpeg(n), f"n01_{n}.jpg": jpeg(n)}
        write_tar(raw / "n01.tar", files)
        report = add_archive(source(raw), out, max_bad_fraction=0.1)
        assert (report.samples, [skipped.member for skipped in report.skipped]) == (
            1,
            [f"n01.tar/n01_{n}.jpg"],
        )
    assert [
        (skipped.member, skipped.reason, skipped.version) for skipped in read_manifest(out).skipped
    ] == [
        ("n01.tar/n01_8.jpg", "has the key of an earlier member", 2),
        ("8 samples of raw", "is in the dataset already (same key)", 2),
        ("n01.tar/n01_9.jpg", "has the key of an earlier member", 3),
        ("10 samples of raw", "is in the dataset already (same key)", 3),
    ]


def test_only_new_tars_of_an_archive_that_grew_are_looked_at(
    tmp_path: Path, make_archive: MakeArchive, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    raw = make_archive(tmp_path / "raw")
    classes = ("n00000000", "n00000001", "n00000002", "n00000009")
    report = write_shards(source(raw), place(tmp_path / "out"), classes=classes)
    assert report.empty_classes == 1
    write_tar(raw / "n00000009.tar", {f"n00000009_{n}.JPEG": jpeg(n) for n in range(5)})
    stages = []
    added = add_archive(source(raw), report.folder, progress=lambda *told: stages.append(told))
    assert ("scan", 1, 1) in stages
    assert (added.samples, added.skipped, added.manifest.samples) == (5, (), 65)
    assert add_archive(source(raw), report.folder).did_nothing


def test_parts_are_added_to_parts(tmp_path: Path, archive: Path, make_archive: MakeArchive) -> None:
    out = place(tmp_path / "out")
    first = write_parts(source(archive), out, val_fraction=0.2)
    new = make_archive(tmp_path / "new", images=25)
    added = add_parts(source(new), out, val_fraction=0.2)
    assert sum(report.samples for report in added) == 15
    whole = write_parts(source(new), place(tmp_path / "whole"), val_fraction=0.2)
    for report, expected in zip(added, whole, strict=True):
        assert sorted(keys(report)) == sorted(keys(expected))
    assert [len(report.manifest.shards) for report in first] == [1, 1]
    shutil.rmtree(tmp_path / "out/val")
    write_shards(source(archive), out / "val", part="val", val_fraction=0.2, seed=9)
    with pytest.raises(DatasetError, match="differ in classes or seed; add to each of them apart"):
        add_parts(source(new), out, val_fraction=0.2)


@pytest.mark.parametrize(
    ("part", "val_fraction", "now"),
    [("all", 0.0, "'all'"), ("train", 0.1, "'train of a split by hash at 0.1'")],
)
def test_what_was_held_out_by_a_hash_is_not_added_to_what_is_trained_on(
    tmp_path: Path, archive: Path, part: str, val_fraction: float, now: str
) -> None:
    out = place(tmp_path / "out")
    train, _ = write_parts(source(archive), out, val_fraction=0.2)
    before = contents(tmp_path / "out")
    message = (
        rf"^{train.folder} holds 'train of a split by hash at 0\.2' and would be given {now} of "
        rf"archive {archive}: .* validation would be trained on; add it to {out} with --append "
        r"--val-fraction 0\.2$"
    )
    with pytest.raises(DatasetError, match=message):
        add_archive(source(archive), train.folder, part=part, val_fraction=val_fraction)
    if part != "all":
        with pytest.raises(DatasetError, match=message):
            add_parts(source(archive), out, val_fraction=val_fraction)
    assert contents(tmp_path / "out") == before


def test_a_retraining_leaves_alone_what_was_held_out_by_a_hash(
    tmp_path: Path, make_archive: MakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = make_archive(tmp_path / "raw"), place(tmp_path / "out")
    train, val = write_parts(source(raw), out, val_fraction=0.2)
    make_archive(raw, images=25)

    def stop(*_: object) -> None:
        raise RunError("enough")

    monkeypatch.setattr("pipelines.retrain.champion", lambda _: SimpleNamespace(version=1))
    monkeypatch.setattr("pipelines.retrain.fetch", stop)
    config = RunConfig(recipe="digits", out=tmp_path / "runs", data=DataConfig(root=out.where))
    with pytest.raises(RunError, match="enough"):
        run_retraining(place(raw), config, Terminal())
    after = replace(train, manifest=read_manifest(train.folder))
    assert after.manifest.version == 2
    assert len(keys(after)) > train.samples
    assert not set(keys(after)) & set(keys(val))


def test_a_release_s_own_split_is_not_added_to_one_by_hash(tmp_path: Path, archive: Path) -> None:
    out = place(tmp_path / "out")
    train, _ = write_parts(source(archive), out, val_fraction=0.2)
    release = replace(source(archive), splits=("train", "test"))
    with pytest.raises(DatasetError, match=r"; add it, folder by folder \(train, test\), to "):
        add_archive(release, train.folder, part="train")


def test_a_dataset_that_was_not_split_by_a_hash_is_not_added_to_by_one(
    tmp_path: Path, archive: Path, dataset: Path
) -> None:
    message = r"holds 'all' and would be given 'train of .*; leave out --val-fraction, or make"
    with pytest.raises(DatasetError, match=message):
        add_archive(source(archive), place(dataset), part="train", val_fraction=0.1)


def test_adding_the_same_archive_twice_does_nothing(
    tmp_path: Path, dataset: Path, archive: Path, make_archive: MakeArchive
) -> None:
    new = make_archive(tmp_path / "new", images=5, first=50)
    assert not add_archive(source(new), place(dataset)).did_nothing
    before = contents(dataset)
    assert add_archive(source(new), place(dataset)).did_nothing
    assert write_shards(source(archive), place(dataset), samples_per_shard=25).did_nothing
    assert contents(dataset) == before


def test_a_tar_that_grew_within_its_padding_is_looked_at_again(
    tmp_path: Path, make_archive: MakeArchive
) -> None:
    raw = make_archive(tmp_path / "raw", classes=1, images=20)
    report = write_shards(source(raw), place(tmp_path / "out"))
    size = (raw / "n00000000.tar").stat().st_size
    make_archive(raw, classes=1, images=25)
    assert (raw / "n00000000.tar").stat().st_size == size
    assert add_archive(source(raw), report.folder).samples == 5


def test_an_archive_of_the_same_names_and_sizes_is_another_one(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    first = make_archive(tmp_path / "a/day", images=4, first=50)
    second = make_archive(tmp_path / "b/day", images=4, first=60)
    sizes = [[path.stat().st_size for path in sorted(each.iterdir())] for each in (first, second)]
    assert sizes[0] == sizes[1]
    assert add_archive(source(first), place(dataset)).samples == 12
    assert add_archive(source(second), place(dataset)).samples == 12


def test_an_archive_that_brings_nothing_new_makes_no_version(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    before = contents(dataset)
    report = add_archive(source(make_archive(tmp_path / "part", images=4)), place(dataset))
    assert (report.did_nothing, report.known, report.skipped) == (True, 12, ())
    assert contents(dataset) == before


def test_an_archive_that_shrank_or_got_an_empty_folder_makes_no_version(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive, write_tar: WriteTar
) -> None:
    raw = make_archive(tmp_path / "raw")
    (raw / "n00000002.tar").unlink()
    before = contents(dataset)
    assert add_archive(source(raw), place(dataset)).did_nothing
    write_tar(raw / "n00000002.tar", {})
    assert add_archive(source(raw), place(dataset)).did_nothing
    assert contents(dataset) == before


def test_an_interrupted_addition_is_continued(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    new = source(make_archive(tmp_path / "new", images=5, first=50))
    straight = shutil.copytree(dataset, tmp_path / "straight")
    add_archive(new, place(straight), samples_per_shard=4)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("write", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_archive(new, place(dataset), samples_per_shard=4, progress=interrupt)
    assert read_manifest(place(dataset)).version == 1
    assert add_archive(new, place(dataset), samples_per_shard=4).kept_shards >= 1
    assert contents(dataset) == contents(straight)


def test_a_shard_that_only_repeats_would_fill_is_left_out(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(4)}
    write_tar(tmp_path / "raw/n01.tar", files)
    out = place(tmp_path / "out")
    write_shards(source(tmp_path / "raw"), out, samples_per_shard=1)
    more = files | {f"n01_{n}.JPEG": jpeg(n) for n in range(4, 6)}
    write_tar(tmp_path / "more/n01.tar", more)
    report = add_archive(source(tmp_path / "more"), out, samples_per_shard=1)
    assert report.samples == 2
    assert [shard.samples for shard in report.manifest.shards] == [1] * 6
    assert read_index(out)["shard"].to_pylist() == list(range(6))
    assert verify(out) == []
