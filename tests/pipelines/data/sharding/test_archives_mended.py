"""Archives that are mended between runs, changed during one, or oddly named; all without Ray."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.data.manifest import Resized
from pipelines.data.sharding.making import FanOut, Making, ShardingReport
from pipelines.data.sharding.plan import Part
from pipelines.data.sharding.versions import Settings, new_version, unit_digests
from pipelines.errors import ArchiveError
from pipelines.storage import Place
from tests.pipelines.data.sharding.sharded import contents, place, samples, source
from tests.raw_archives import encoded, jpegs, tar_bytes, write_files, write_tar

IMAGES = {wnid: jpegs(wnid, 12, first) for wnid, first in (("n01440764", 0), ("n01443537", 50))}


def in_turn(
    task: Callable[[Any, Any], Any],
    job: Any,
    work: Sequence[Any],
    sizes: Sequence[int],
    kept: Place,
) -> Iterator[tuple[int, Any]]:
    """Runs tasks in this process, with items and answers as JSON has them."""
    for at, item in enumerate(work):
        yield at, json.loads(json.dumps(task(job, json.loads(json.dumps(item)))))


def make(
    archive: Path,
    out: Path,
    *,
    resized: Resized | None = None,
    max_bad_fraction: float = 0.0,
    fan_out: FanOut = in_turn,
) -> ShardingReport:
    """What `write_shards` does, without Ray."""
    settings = Settings(
        seed=0, samples_per_shard=9, val_fraction=0.0, classes=None, resized=resized
    )
    found = source(archive)
    making = Making(settings, max_bad_fraction=max_bad_fraction, progress=None, fan_out=fan_out)
    part = Part(name="all", out=place(out))
    version = new_version(found, unit_digests(found), part, settings)
    (report,) = making.make(found, part.out, (version,))
    return report


def class_tars(folder: Path) -> Path:
    for wnid, images in IMAGES.items():
        write_tar(folder / f"{wnid}.tar", images)
    return folder / "n01443537.tar"


def compressed(folder: Path) -> Path:
    tars = {f"{wnid}.tar": tar_bytes(images) for wnid, images in IMAGES.items()}
    return write_tar(folder / "winter21.tar.gz", tars)


def loose_files(folder: Path) -> Path:
    for wnid, images in IMAGES.items():
        write_files(folder / wnid, images)
    return folder / "n01440764" / "n01440764_3.JPEG"


class TestMending:
    @pytest.mark.parametrize("write", [class_tars, compressed, loose_files])
    def test_an_archive_that_was_mended_is_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
    ) -> None:
        for ends in ("FIRST_BYTES", "LAST_BYTES"):  # as much of these tars as of large ones
            monkeypatch.setattr(f"pipelines.data.sharding.versions.{ends}", 64)
        damaged = write(tmp_path / "raw")
        archive = damaged if write is compressed else tmp_path / "raw"
        whole, third = damaged.read_bytes(), damaged.stat().st_size // 3
        damaged.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
        before = damaged.stat()
        with pytest.raises(ArchiveError, match=r"cannot be used .*mend the archive or raise"):
            make(archive, tmp_path / "out")
        damaged.write_bytes(whole)
        os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))  # as wget and rsync do
        assert make(archive, tmp_path / "out").samples == 24
        assert not (tmp_path / "out/.unfinished").exists()

    def test_what_was_scanned_is_kept_while_the_archive_stays(self, tmp_path: Path) -> None:
        damaged = class_tars(tmp_path / "raw")
        damaged.write_bytes(damaged.read_bytes()[:600])
        kept = []
        for _ in range(2):
            with pytest.raises(ArchiveError, match="cannot be used"):
                make(tmp_path / "raw", tmp_path / "out")
            scans = (tmp_path / "out/.unfinished/scan").glob("*/*.parquet")
            kept.append({path.name: path.stat().st_mtime_ns for path in scans})
        assert kept[0] == kept[1]
        assert len(kept[0]) == 4  # samples and problems of two units

    def test_a_copy_of_an_archive_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for copy in ("a/raw", "b/raw"):
            loose_files(tmp_path / copy)
            make(tmp_path / copy, (tmp_path / copy).parent / "out")
        assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


class TestChanging:
    def test_a_file_that_is_replaced_before_it_is_written_is_told_and_then_read_again(
        self, tmp_path: Path
    ) -> None:
        file = loose_files(tmp_path / "raw")
        longer = jpegs("n01440764", 1, first=900)["n01440764_900.JPEG"] + bytes(9000)

        def replaced(task: Callable[[Any, Any], Any], *rest: Any) -> Iterator[tuple[int, Any]]:
            if "write" in task.__name__:
                file.write_bytes(longer)
            return in_turn(task, *rest)

        message = r"n01440764/n01440764_3\.JPEG was changed after it was scanned; leave .*raw as it"
        with pytest.raises(ArchiveError, match=message):
            make(tmp_path / "raw", tmp_path / "out", fan_out=replaced)
        report = make(tmp_path / "raw", tmp_path / "out")
        assert {sample["jpg"] for sample in samples(report)} == {
            path.read_bytes() for path in (tmp_path / "raw").rglob("*.JPEG")
        }


class TestOddNames:
    def test_an_archive_may_have_any_bytes_as_its_name(self, tmp_path: Path) -> None:
        class_tars(tmp_path / "odd\udcff")
        class_tars(tmp_path / "plain")
        odd = make(tmp_path / "odd\udcff", tmp_path / "out")
        plain = make(tmp_path / "plain", tmp_path / "out-plain")
        assert odd.manifest.sources[0].name == "odd\\xff"
        assert odd.manifest.shards == plain.manifest.shards

    def test_a_class_tar_whose_name_is_no_utf8_is_told_to_be_renamed(self, tmp_path: Path) -> None:
        class_tars(tmp_path / "raw").rename(tmp_path / "raw" / "n01443537\udcff.tar")
        message = (
            r"n01443537\\xff\.tar has a name that is not printable UTF-8; rename it; mend the a"
        )
        with pytest.raises(ArchiveError, match=message):
            make(tmp_path / "raw", tmp_path / "out")
        report = make(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.7)
        assert report.samples == 12
        assert [skipped.member for skipped in report.skipped] == ["n01443537\\xff.tar"]


class TestResizing:
    def test_an_image_that_cannot_be_resized_is_counted_and_named_as_a_bad_one(
        self, tmp_path: Path
    ) -> None:
        class_tars(tmp_path / "raw")
        wide = {
            "n01530575_1.JPEG": encoded(Image.new("RGB", (70_000, 8)), "PNG"),
            "n01530575_2.JPEG": encoded(Image.new("RGB", (70_000, 20)), "PNG"),
        }
        write_tar(tmp_path / "raw" / "n01530575.tar", wide)
        resized = Resized(short_side=16, quality=80)
        reason = "would have a side above the 65500 pixels of a JPEG when resized"
        message = (
            rf"1 of the 26 files .*\(3\.85%.*: n01530575\.tar/n01530575_1\.JPEG {reason}; mend"
        )
        with pytest.raises(ArchiveError, match=message):
            make(tmp_path / "raw", tmp_path / "out", resized=resized)
        report = make(tmp_path / "raw", tmp_path / "out", resized=resized, max_bad_fraction=0.1)
        assert report.samples == 25
        assert [skipped.reason for skipped in report.skipped] == [reason]
        assert make(tmp_path / "raw", tmp_path / "as-it-is").samples == 26

    def test_another_size_is_another_scan(self, tmp_path: Path) -> None:
        wide = {"n01530575_1.JPEG": encoded(Image.new("RGB", (70_000, 20)), "PNG")}
        write_tar(tmp_path / "raw" / "n01530575.tar", wide)
        with pytest.raises(ArchiveError, match="holds no images: none of its 1 files can be used"):
            make(tmp_path / "raw", tmp_path / "out", resized=Resized(short_side=32, quality=80))
        resized = Resized(short_side=16, quality=80)
        assert make(tmp_path / "raw", tmp_path / "out", resized=resized).samples == 1
