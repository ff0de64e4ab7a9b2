"""Trees of class folders in tars, plain or compressed: parts, additions, and repeated keys."""

from pathlib import Path

import pytest

from pipelines.data.manifest import read_index
from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.shards import add_parts, write_parts, write_shards
from pipelines.errors import ArchiveError, UsageError
from tests.pipelines.data.sharding.sharded import contents, keys, place, source
from tests.raw_archives import jpeg, write_tar

pytestmark = pytest.mark.usefixtures("ray_session")


def tree(first: int = 0, splits: tuple[str, ...] = ("train", "test")) -> dict[str, bytes]:
    return {
        f"cifar/{split}/{name}/{first + k}.jpg": jpeg(first + k)
        for split in splits
        for name in ("cat", "dog")
        for k in range(3)
    }


def test_a_compressed_tree_becomes_the_parts_that_it_has(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "cifar.tar.gz", tree())
    reports = write_parts(source(raw), place(tmp_path / "out"))
    plain = write_parts(source(write_tar(tmp_path / "cifar.tar", tree())), place(tmp_path / "o"))
    assert [report.folder.name for report in reports] == ["train", "test"]
    assert [report.samples for report in reports] == [6, 6]
    for one, other in zip(reports, plain, strict=True):
        rows = (
            read_index(each.folder).select(["key", "label"]).to_pylist() for each in (one, other)
        )
        assert next(rows) == next(rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]


def test_a_compressed_tree_that_was_sharded_is_not_read_again(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "cifar.tar.gz", tree())
    out = place(tmp_path / "out")
    write_parts(source(raw), out)
    before = contents(tmp_path / "out")

    def read_again(stage: str, done: int, total: int) -> None:
        raise AssertionError(stage)

    again = write_parts(source(raw), out, progress=read_again)
    assert [(report.folder.name, report.did_nothing) for report in again] == [
        ("train", True),
        ("test", True),
    ]
    assert contents(tmp_path / "out") == before


def test_a_compressed_tree_is_added_to_the_parts_that_it_has(tmp_path: Path) -> None:
    out = place(tmp_path / "out")
    write_parts(source(write_tar(tmp_path / "a.tar.gz", tree())), out)
    more = source(write_tar(tmp_path / "b.tar.gz", tree(10, ("train", "val"))))
    added = add_parts(more, out)
    assert [(report.folder.name, report.samples, report.did_nothing) for report in added] == [
        ("train", 6, False),
        ("val", 6, False),
        ("test", 0, True),
    ]
    assert [report.manifest.version for report in added] == [2, 1, 1]
    assert {report.manifest.classes for report in added} == {("cat", "dog")}
    assert [report.did_nothing for report in add_parts(more, out)] == [True, True, True]


def test_a_part_that_a_compressed_tree_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "cifar.tar.gz", tree())
    message = r"archive .*/cifar\.tar\.gz has no part 'val'; choose all or train or test$"
    with pytest.raises(UsageError, match=message):
        write_shards(source(raw), place(tmp_path / "out"), part="val")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [UNFINISHED]


def test_files_outside_the_splits_are_told_with_the_archive_s_name(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "cifar.tar.gz", tree() | {"cifar/more/cat/1.jpg": jpeg()})
    message = (
        r"^1 of the 13 files in archive \S*/cifar\.tar\.gz cannot .*: "
        r"cifar\.tar\.gz/cifar/more/cat/1\.jpg lies in no class folder of train or test; mend"
    )
    with pytest.raises(ArchiveError, match=message):
        write_parts(source(raw), place(tmp_path / "out"))


def test_too_many_repeated_keys_stop_the_run_and_its_shards_are_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        files = {f"{name}/{k}.jpg": jpeg(number) for name in ("cat", "dog") for k in range(3)}
        write_tar(tmp_path / f"raw/part-{number}.tar", files)
    out = place(tmp_path / "out")
    message = (
        r"^6 of the 12 files in archive \S*/raw have the key of an earlier member \(class, folders "
        r"and name, without suffix\) \(50\.00% are left out, the limit is 1\.00%\): "
        r"part-2\.tar/cat/0\.jpg, part-2\.tar/cat/1\.jpg, part-2\.tar/cat/2\.jpg; rename them or"
    )
    with pytest.raises(ArchiveError, match=message):
        write_shards(source(tmp_path / "raw"), out)
    assert not (tmp_path / "out/manifest.json").exists()
    report = write_shards(source(tmp_path / "raw"), out, max_bad_fraction=0.5)
    assert (report.kept_shards, report.samples, len(report.skipped)) == (1, 6, 6)
    assert sorted(keys(report)) == [f"{name}_{k}" for name in ("cat", "dog") for k in range(3)]
