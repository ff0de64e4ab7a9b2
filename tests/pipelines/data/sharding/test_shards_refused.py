"""What sharding refuses, in one line each, and what is left where it does."""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.manifest import Resized, read_manifest, seal, write_manifest
from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.shards import (
    ShardingReport,
    add_archive,
    add_parts,
    write_parts,
    write_shards,
)
from pipelines.data.verify import verify
from pipelines.errors import ArchiveError, DatasetError, RunError, UsageError
from pipelines.storage import StorageError
from tests.pipelines.data.sharding.sharded import contents, folder, keys, place, source

pytestmark = pytest.mark.usefixtures("ray_session")

MakeArchive = Callable[..., Path]
WriteTar = Callable[..., Path]
Jpeg = Callable[[int], bytes]


def test_too_many_bad_members_stop_the_run_and_their_scan_is_kept(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    files = {f"n01_{n}.JPEG": jpeg(n) for n in range(6)}
    files |= {f"n01_{n}.JPEG": b"<html>" for n in range(6, 10)}
    write_tar(tmp_path / "raw/n01.tar", files)
    message = (
        r"^4 of the 10 files .* cannot be used \(40\.00%, the limit is 1\.00%\): "
        r"n01\.tar/n01_6\.JPEG does not decode.*n01_7.*n01_8.*; mend the archive or raise "
        r"--max-bad-fraction \(what was found is kept in .*out/\.unfinished for the next run\)$"
    )
    out = place(tmp_path / "out")
    with pytest.raises(ArchiveError, match=message):
        write_shards(source(tmp_path / "raw"), out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]
    scans = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.parquet")}
    seen = {}

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "write":
            seen.update({path: path.stat().st_ino for path in scans})

    report = write_shards(source(tmp_path / "raw"), out, max_bad_fraction=0.5, progress=watch)
    assert seen == scans
    assert (report.samples, len(report.skipped)) == (6, 4)


def test_an_archive_without_images_is_refused(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg
) -> None:
    write_tar(tmp_path / "raw/n01.tar", {"n01_1.JPEG": b"<html>", "n01_2.JPEG": b""})
    with pytest.raises(ArchiveError, match=r"holds no images: none of its 2 files .*n01\.tar/n"):
        write_shards(source(tmp_path / "raw"), place(tmp_path / "out"), max_bad_fraction=1.0)
    raw = source(tmp_path / "raw")
    write_tar(tmp_path / "raw/n01.tar", {})
    with pytest.raises(ArchiveError, match="holds no images: its 1 pieces are empty"):
        write_shards(raw, place(tmp_path / "other"))


def test_a_damaged_tar_loses_only_what_follows_and_counts_it(
    tmp_path: Path, make_archive: MakeArchive
) -> None:
    raw = make_archive(tmp_path / "raw")
    tar = raw / "n00000001.tar"
    whole = source(raw)
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(ArchiveError, match=r"about \d+ of the \d+ files .*is cut off: it ends at"):
        write_shards(whole, place(tmp_path / "out"))
    report = write_shards(whole, place(tmp_path / "out"), max_bad_fraction=0.9)
    assert 40 < report.samples < 60
    assert [skipped.member for skipped in report.skipped] == ["n00000001.tar"]
    assert verify(report.folder) == []


def test_classes_outside_of_the_list_are_refused_before_any_work(
    tmp_path: Path, archive: Path
) -> None:
    message = r"has 2 classes that the list of 1 classes lacks: n00000001, n00000002; take them"
    with pytest.raises(ArchiveError, match=message):
        write_shards(source(archive), place(tmp_path / "out"), classes=("n00000000",))
    assert not (tmp_path / "out").exists()


def test_classes_that_only_a_scan_finds_are_refused_with_their_counts(
    tmp_path: Path, jpeg: Jpeg, write_tar: WriteTar
) -> None:
    files = {f"{name}/{n}.jpg": jpeg(n) for name in ("cat", "dog") for n in range(3)}
    write_tar(tmp_path / "raw.tar", files)
    raw = source(tmp_path / "raw.tar")
    with pytest.raises(ArchiveError, match=r"has 1 classes .*lacks: dog \(3 samples\);"):
        write_shards(raw, place(tmp_path / "out"), classes=("cat",))


def test_adding_a_class_that_the_dataset_lacks_is_refused(
    tmp_path: Path, made: ShardingReport, make_archive: MakeArchive
) -> None:
    before = contents(folder(made))
    new = make_archive(tmp_path / "new", classes=4)
    with pytest.raises(ArchiveError, match=r"1 classes that the list of 3 .* lacks: n00000003;"):
        add_archive(source(new), made.folder)
    assert contents(folder(made)) == before


def test_adding_to_a_folder_without_manifest_is_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(DatasetError, match="is not a finished dataset"):
        add_archive(source(archive), place(tmp_path / "absent"))


def test_adding_to_a_dataset_that_lacks_a_shard_is_refused(
    tmp_path: Path, archive: Path, make_archive: MakeArchive
) -> None:
    out = place(tmp_path / "out")
    write_shards(source(archive), out, samples_per_shard=25)
    (tmp_path / "out/shard-000001.tar").unlink()
    new = make_archive(tmp_path / "new", first=90)
    with pytest.raises(DatasetError, match=r"shard-000001\.tar is missing or not \d+ bytes long"):
        add_archive(source(new), out)


def test_adding_videos_to_images_is_refused(archive: Path, made: ShardingReport) -> None:
    videos = replace(source(archive), media="video")
    with pytest.raises(DatasetError, match=r"holds images and archive .* videos; make a dataset"):
        add_archive(videos, made.folder)


@pytest.mark.parametrize("name", ["letter.txt", "shard-000000.tar", "index.parquet"])
def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, archive: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(
        DatasetError, match=rf"holds something else \(first {name}\); choose an emp"
    ):
        write_shards(source(archive), place(out))
    assert contents(out) == {name: b"mine"}


def test_something_else_beside_a_dataset_stops_an_addition(
    tmp_path: Path, archive: Path, make_archive: MakeArchive
) -> None:
    out = tmp_path / "out"
    write_shards(source(archive), place(out))
    (out / "shard-000003.tar").write_text("mine")
    new = make_archive(tmp_path / "new", first=90)
    with pytest.raises(
        DatasetError, match=r"holds something else \(first shard-000003\.tar\); mov"
    ):
        add_archive(source(new), place(out))
    assert (out / "shard-000003.tar").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DatasetError, match="is a file; choose an empty folder"):
        write_shards(source(archive), place(tmp_path / "out"))
    with pytest.raises(StorageError, match=r"out/below cannot be .*: Not a directory; mend that"):
        write_shards(source(archive), place(tmp_path / "out/below"))


def test_two_runs_into_one_folder_at_once_are_refused(tmp_path: Path, archive: Path) -> None:
    out = place(tmp_path / "out")
    refused = []

    def run_again(stage: str, done: int, total: int) -> None:
        with pytest.raises(RunError, match=r"another sharding into .*out is under way \(it holds "):
            write_shards(source(archive), out)
        refused.append(stage)

    report = write_shards(source(archive), out, progress=run_again)
    assert set(refused) == {"scan", "write"}
    assert report.samples == 60
    assert verify(report.folder) == []
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_run_into_one_part_and_one_into_all_parts_at_once_are_refused(
    tmp_path: Path, archive: Path, make_archive: MakeArchive
) -> None:
    out, raw = place(tmp_path / "out"), source(archive)
    train, _ = write_parts(raw, out, val_fraction=0.2)
    new = source(make_archive(tmp_path / "new", images=5, first=50))
    newer = source(make_archive(tmp_path / "newer", images=5, first=60))
    newest = source(make_archive(tmp_path / "newest", images=5, first=70))
    refused = []

    def add_to_part(stage: str, done: int, total: int) -> None:
        with pytest.raises(RunError, match=r"another sharding into .*out/train is under way \(it"):
            add_archive(new, train.folder, part="train", val_fraction=0.2)
        refused.append(stage)

    def add_to_parts(stage: str, done: int, total: int) -> None:
        with pytest.raises(RunError, match=r"another sharding into .*out/train is under way \(it"):
            add_parts(newest, out, val_fraction=0.2)
        refused.append(stage)

    added = add_parts(new, out, val_fraction=0.2, progress=add_to_part)
    assert [report.manifest.version for report in added] == [2, 2]
    assert set(refused) == {"scan", "write"}
    add_archive(newer, train.folder, part="train", val_fraction=0.2, progress=add_to_parts)
    assert verify(train.folder) == []
    assert not [name for name in contents(tmp_path / "out") if Path(name).name.startswith(".")]


def test_a_dataset_that_another_run_finished_meanwhile_is_left_as_it_is(
    tmp_path: Path, dataset: Path, make_archive: MakeArchive
) -> None:
    new = source(make_archive(tmp_path / "new", images=5, first=50))
    base = read_manifest(place(dataset))
    other = seal(replace(base, version=2))
    index = (dataset / "index.parquet").read_bytes()

    def finish_another(stage: str, done: int, total: int) -> None:
        write_manifest(place(dataset), other)

    with pytest.raises(RunError, match=r"dataset was changed by another run .* `mone verify /"):
        add_archive(new, place(dataset), progress=finish_another)
    assert read_manifest(place(dataset)) == other
    assert (dataset / "index.parquet").read_bytes() == index


def test_an_archive_that_is_refused_leaves_no_empty_folders_of_parts(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    write_tar(tmp_path / "raw/n01.tar", {"n01_1.JPEG": b"<html>"})
    with pytest.raises(ArchiveError, match="holds no images"):
        write_parts(source(tmp_path / "raw"), place(tmp_path / "out"), val_fraction=0.2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]


def test_a_truncated_stream_is_taken_only_where_any_loss_is(tmp_path: Path, archive: Path) -> None:
    path = tmp_path / "raw.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for each in sorted(archive.iterdir()):
            tar.add(each, each.name)
    path.write_bytes(path.read_bytes()[:-4])  # all samples are there, and nobody knows
    out = place(tmp_path / "out")
    with pytest.raises(ArchiveError, match=r"is cut off, and nobody can tell .*bad-fraction 1 \("):
        write_shards(source(path), out, max_bad_fraction=0.5)
    assert write_shards(source(path), out, max_bad_fraction=1.0).samples == 60


def test_a_dataset_of_another_archive_is_not_overwritten(
    tmp_path: Path, made: ShardingReport, make_archive: MakeArchive
) -> None:
    other = make_archive(tmp_path / "other", images=2)
    message = r"made from another archive or part \(archive, all\);.*--append"
    with pytest.raises(DatasetError, match=message):
        write_shards(source(other), made.folder)
    with pytest.raises(DatasetError, match=message):
        write_shards(source(other), made.folder, part="train", val_fraction=0.1)


def test_a_dataset_made_with_other_settings_is_not_overwritten(
    made: ShardingReport, archive: Path
) -> None:
    raw = source(archive)
    with pytest.raises(DatasetError, match=r"other settings \(seed: 0, now 5\)"):
        write_shards(raw, made.folder, seed=5, samples_per_shard=25)
    with pytest.raises(DatasetError, match=r"other settings \(samples per shard: 25, now 4096\)"):
        write_shards(raw, made.folder)
    with pytest.raises(DatasetError, match=r"other settings \(classes: others than now\)"):
        write_shards(raw, made.folder, classes=("a", *made.manifest.classes))


def test_parts_and_settings_that_cannot_be_are_refused(tmp_path: Path, archive: Path) -> None:
    raw, out = source(archive), place(tmp_path / "out")
    with pytest.raises(UsageError, match=r"no part 'test'; choose all, or give a validation frac"):
        write_shards(raw, out, part="test")
    with pytest.raises(UsageError, match=r"has no part 'test'; choose all or train or val$"):
        write_shards(raw, out, part="test", val_fraction=0.1)
    with pytest.raises(UsageError, match=r"splits of its own \(a, b\); leave out the validation"):
        write_parts(replace(raw, splits=("a", "b")), out, val_fraction=0.1)
    with pytest.raises(UsageError, match=r"a share from 0 to below 1, got 1\.0"):
        write_parts(raw, out, val_fraction=1.0)
    with pytest.raises(UsageError, match="samples per shard must be 1 or more, got 0"):
        write_shards(raw, out, samples_per_shard=0)
    with pytest.raises(UsageError, match="a quality from 1 to 100, got 32 and 0"):
        write_shards(raw, out, resized=Resized(short_side=32, quality=0))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match=rf"bad files that is allowed is .*, got {share}$"):
            write_shards(raw, out, max_bad_fraction=share)
    videos = replace(raw, media="video")
    with pytest.raises(UsageError, match="holds videos, and only images can be resized; leave out"):
        write_shards(videos, out, resized=Resized(short_side=32, quality=90))
    assert not (tmp_path / "out").exists()


def test_a_tar_that_shrinks_between_the_passes_stops_the_run_and_keeps_the_rest(
    tmp_path: Path, make_archive: MakeArchive
) -> None:
    raw = make_archive(tmp_path / "raw")

    def shrink(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("scan", total):
            (raw / "n00000001.tar").write_bytes(b"")

    message = (
        r"n00000001\.tar/.* was changed .* \(20 of 60 pieces of work failed; what is finished "
        r"is kept in .*out: mend this and run the same again\)$"
    )
    with pytest.raises(DatasetError, match=message):
        write_shards(source(raw), place(tmp_path / "out"), samples_per_shard=1, progress=shrink)
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list((tmp_path / "out").glob("shard-*.tar"))) == 40
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_dataset_that_was_changed_by_hand_is_not_added_to(tmp_path: Path, archive: Path) -> None:
    report = write_shards(source(archive), place(tmp_path / "out"))
    path = tmp_path / "out/manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DatasetError, match="was changed: its digest differs"):
        add_archive(source(archive), report.folder)
    write_manifest(report.folder, report.manifest)
    assert len(keys(report)) == 60
