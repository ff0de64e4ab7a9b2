"""`mone shard` and `mone verify` as commands: what they say, and what they refuse."""

import argparse
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from pipelines.commands import shard, verify
from pipelines.data.manifest import read_manifest
from pipelines.errors import DatasetError, UsageError
from tests.pipelines.data.sharding.sharded import contents, place

pytestmark = pytest.mark.usefixtures("ray_session")

MakeArchive = Callable[..., Path]


def run(command: Callable[..., int], *arguments: object) -> int:
    return command(argparse.ArgumentParser(), [str(each) for each in arguments])


@pytest.fixture
def archive(tmp_path: Path, make_archive: MakeArchive) -> Path:
    return make_archive(tmp_path / "raw")


def packed(archive: Path, to: Path, mode: str) -> Path:
    """All tars of an archive in one outer tar."""
    with tarfile.open(to, mode) as tar:
        for path in sorted(archive.iterdir()):
            tar.add(path, path.name)
    return to


def fields(dataset: Path) -> list[tuple[str, bytes, bytes]]:
    """Key, image and label of every sample, in order; only the name in its json is the tar's."""
    samples = webdataset.WebDataset([str(dataset / "shard-000000.tar")], shardshuffle=False)
    return [(sample["__key__"], sample["jpg"], sample["cls"]) for sample in samples]


def test_a_dataset_is_made_told_of_and_verified(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archive / "n00000001.tar").write_bytes(b"")
    (archive / "n00000001.tar").write_bytes(bytes(10240))
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(f"n{n:08d}" for n in range(5)) + "\n")
    out = tmp_path / "out"
    assert run(shard.main, archive, out, "--classes", classes, "--samples-per-shard", 15) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0] == f"40 samples; version 1: 40 in 3 shards of 5 classes -> {out}"
    assert lines[1:3] == [
        "  remark on 40: has a side below 32 pixels",
        "  3 classes have no samples here",
    ]
    assert re.fullmatch(r"40 samples, \S+ MB in \S+ s: \d+ samples/s, \S+ MB/s", lines[3])
    assert f"sharding {out} 100% write 3/3" in told.err
    assert run(verify.main, out) == 0
    assert "40 samples in 3 shards are whole" in capsys.readouterr().out
    assert run(shard.main, archive, out, "--classes", classes, "--samples-per-shard", 15) == 0
    assert "already; nothing to do" in capsys.readouterr().out


def test_broken_datasets_are_named_and_exit_as_mistakes(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(shard.main, archive, out, "--val-fraction", 0.2)
    (out / "train/shard-000000.tar").unlink()
    (out / "val/index.parquet").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"train: shard-000000\.tar is missing \(and 1 more\)"):
        run(verify.main, out)
    told = capsys.readouterr().out
    assert "train: shard-000000.tar is missing" in told
    assert "val: index.parquet was changed" in told


def test_an_outer_tar_plain_or_compressed_gives_the_samples_of_the_folder(
    tmp_path: Path, archive: Path
) -> None:
    run(shard.main, archive, tmp_path / "folder")
    run(shard.main, packed(archive, tmp_path / "whole.tar", "w"), tmp_path / "tar")
    gz = packed(archive, tmp_path / "whole.tar.gz", "w:gz")
    run(shard.main, gz, tmp_path / "gz")
    first, second = (contents(tmp_path / each)["shard-000000.tar"] for each in ("folder", "tar"))
    assert first == second
    assert fields(tmp_path / "gz") == fields(tmp_path / "folder")
    assert len(fields(tmp_path / "gz")) == 60
    assert not (tmp_path / "gz/.unfinished").exists()
    before = contents(tmp_path / "gz")
    run(shard.main, gz, tmp_path / "gz")
    assert contents(tmp_path / "gz") == before


def test_archives_are_added_to_a_dataset_or_to_its_parts(
    tmp_path: Path, archive: Path, make_archive: MakeArchive, capsys: pytest.CaptureFixture[str]
) -> None:
    more = make_archive(tmp_path / "more", images=25)
    run(shard.main, archive, tmp_path / "one")
    run(shard.main, more, tmp_path / "one", "--append")
    assert read_manifest(place(tmp_path / "one")).samples == 75
    told = capsys.readouterr().out
    assert "15 samples, 60 there already (same key); version 2: 75 in 2 shards" in told
    run(shard.main, make_archive(tmp_path / "few", images=4), tmp_path / "one", "--append")
    told = capsys.readouterr().out
    assert (
        "one holds 75 samples in 2 shards already, 12 of them in this archive; nothing to do"
        in told
    )
    run(shard.main, archive, tmp_path / "two", "--val-fraction", 0.3)
    run(shard.main, more, tmp_path / "two", "--append", "--val-fraction", 0.3)
    parts = [read_manifest(place(tmp_path / "two" / part)) for part in ("train", "val")]
    assert sum(part.samples for part in parts) == 75
    assert [part.version for part in parts] == [2, 2]


def test_classes_come_from_a_file_or_from_a_dataset(tmp_path: Path, archive: Path) -> None:
    run(shard.main, archive, tmp_path / "out", "--resize", 8, "--quality", 50)
    resized = read_manifest(place(tmp_path / "out")).resized
    assert resized
    assert (resized.short_side, resized.quality) == (8, 50)
    assert shard.read_classes(place(tmp_path / "out")) == ("n00000000", "n00000001", "n00000002")
    names = tmp_path / "names.txt"
    names.write_text("b\n\n a \n")
    assert shard.read_classes(place(names)) == ("b", "a")
    names.write_text("a\nb\na\n")
    with pytest.raises(UsageError, match=r"names\.txt names 'a' twice; write every class on a"):
        shard.read_classes(place(names))
    names.write_bytes(b"\n")
    with pytest.raises(UsageError, match="holds no names; write every class on a line"):
        shard.read_classes(place(names))
    names.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        shard.read_classes(place(names))
    with pytest.raises(UsageError, match="is neither a file of class names, one a line, nor a da"):
        shard.read_classes(place(tmp_path / "absent"))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(UsageError, match="--append keeps the dataset's classes and size of images"):
        run(shard.main, archive, tmp_path / "out", "--append", "--resize", 8)
    with pytest.raises(UsageError, match="--quality 50 is that of --resize; give both or neither"):
        run(shard.main, archive, tmp_path / "out", "--quality", 50)
    with pytest.raises(UsageError, match="a quality from 1 to 100, got 8 and 0"):
        run(shard.main, archive, tmp_path / "out", "--resize", 8, "--quality", 0)
    assert not (tmp_path / "out").exists()


def test_parts_are_not_mixed_into_one_dataset(tmp_path: Path, archive: Path) -> None:
    run(shard.main, archive, tmp_path / "out")
    with pytest.raises(
        UsageError, match=r"out, which is one dataset, .*\(train, val\); give the f"
    ):
        run(shard.main, archive, tmp_path / "out", "--append", "--val-fraction", 0.2)
