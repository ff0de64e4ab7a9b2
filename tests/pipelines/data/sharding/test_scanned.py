"""Results of scans on disk: read by range, merged, and never all in memory at once."""

import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.manifest import INDEX_SCHEMA, ShardRecord
from pipelines.data.sharding import pack as packing
from pipelines.data.sharding.making import Making
from pipelines.data.sharding.pack import Packed, SideFile
from pipelines.data.sharding.plan import BINS, Part, PartCount, ShardJob, ShardRange, order_hash
from pipelines.data.sharding.scanned import (
    Scanned,
    UnitFound,
    merge,
    problems,
    rows_between,
    scan_file,
    scan_unit,
    whole_file,
)
from pipelines.data.sharding.versions import Settings, new_version, unit_digests
from pipelines.data.sources.base import Source, Unit
from pipelines.errors import ArchiveError
from pipelines.storage import Place, StorageError
from tests.pipelines.data.sharding.sharded import place, source


@pytest.fixture
def job(tmp_path: Path, make_archive: Callable[..., Path]) -> ShardJob:
    """Three units of twenty images each, scanned."""
    found = source(make_archive(tmp_path / "raw"))
    made = ShardJob(
        source=found,
        units=unit_digests(found),
        parts=(Part(name="all", out=place(tmp_path / "out")),),
        scratch=place(tmp_path / "scan"),
        classes=None,
        seed=7,
    )
    for unit in range(3):
        scan_unit(made, unit)
    return made


def files(job: ShardJob) -> list[Scanned]:
    return [Scanned(name=scan_file(job, unit).name, unit=unit) for unit in range(3)]


def test_numbers_of_a_unit_are_read_back_from_its_file(job: ShardJob) -> None:
    inode = (job.scratch / f"{job.units[0]}.parquet").local.stat().st_ino
    found = scan_unit(job, 0)
    assert (job.scratch / f"{job.units[0]}.parquet").local.stat().st_ino == inode
    assert found.counts[0].samples == found.samples.sum() == 20
    assert found.counts[0].classes == {"n00000000": 20}
    bins = sorted(order_hash(7, f"n00000000_{n}") >> 44 for n in range(20))
    assert np.repeat(found.bins, found.samples).tolist() == bins
    back = UnitFound.of(found.told())
    assert back.counts == found.counts
    assert list(problems(job, 0)) == []


def test_ranges_hold_every_row_once(job: ShardJob) -> None:
    cuts = [0, 1, 3000, 500_000, 500_001, BINS]
    ranges = [rows_between(job, files(job), *cut) for cut in itertools.pairwise(cuts)]
    keys = [key for rows in ranges for key in rows["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 60
    for (first, last), rows in zip(itertools.pairwise(cuts), ranges, strict=True):
        assert all(first <= order >> 44 < last for order in rows["order"].to_pylist())
    assert rows_between(job, [], 0, BINS).num_rows == 0


def test_merged_files_hold_the_same_rows_and_know_their_units(job: ShardJob) -> None:
    merged = merge(job, [0, 2])
    by = [("order", "ascending")]
    apart = rows_between(job, [files(job)[0], files(job)[2]], 0, BINS).sort_by(by)
    together = rows_between(job, [merged], 0, BINS)
    assert together.to_pylist() == apart.to_pylist()
    assert set(together["unit"].to_pylist()) == {0, 2}
    inode = (job.scratch / merged.name).local.stat().st_ino
    assert merge(job, [0, 2]) == merged
    assert (job.scratch / merged.name).local.stat().st_ino == inode


def test_a_unit_is_sorted_in_runs_whatever_its_size(
    job: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_between(job, files(job), 100_000, 900_000).sort_by("order").to_pylist()
    monkeypatch.setattr("pipelines.data.sharding.scanned.GROUP_ROWS", 3)
    monkeypatch.setattr("pipelines.data.sharding.scanned.RUN_ROWS", 6)
    for unit in range(3):
        scan_file(job, unit).remove()
        scan_unit(job, unit)
    assert rows_between(job, files(job), 100_000, 900_000).sort_by("order").to_pylist() == whole


def test_a_tar_that_cannot_be_read_now_is_scanned_again_later(job: ShardJob) -> None:
    scan_file(job, 1).remove()
    tar = job.source.archive / job.source.units[1].path
    content = tar.read_bytes()
    tar.remove()
    with pytest.raises(ArchiveError, match=r"n00000001\.tar cannot be read: No such file"):
        scan_unit(job, 1)
    assert not scan_file(job, 1).is_file()
    tar.write_bytes(content)
    assert scan_unit(job, 1).counts[0].samples == 20


def test_a_file_that_cannot_be_read_now_is_no_bad_sample(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "raw/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"raw/cat/{name}.jpg").write_bytes(b"x")
    found = source(tmp_path / "raw")
    made = ShardJob(
        source=found,
        units=unit_digests(found),
        parts=(Part(name="all", out=place(tmp_path / "out")),),
        scratch=place(tmp_path / "scan"),
        classes=None,
        seed=7,
    )
    (tmp_path / "raw/cat").rename(tmp_path / "raw/dog")
    (tmp_path / "raw/cat").write_bytes(b"")  # as a folder that may not be listed
    with pytest.raises(ArchiveError, match=r"^cat/ cannot be read: Not a directory$"):
        scan_unit(made, 0)
    assert not scan_file(made, 0).is_file()


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(place(tmp_path / "x")) as path:
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(StorageError, match="/x cannot be read or written: disk full; mend"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with whole_file(place(tmp_path / "x")) as path:
        path.write_bytes(b"whole")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("x", b"whole")]


def test_the_driver_s_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    few, many = (peak_of(tmp_path / str(n), members=n) for n in (2_000, 200_000))
    assert many < few + 4 * 2**20


def peak_of(folder: Path, *, members: int) -> int:
    """Bytes that the driver holds at most, beside what the tasks do elsewhere."""
    folder.mkdir()
    (folder / "x.tar").write_bytes(bytes(1024))
    units = [Unit(kind="tar", path="x.tar", name=f"{n}", size=1024) for n in range(20)]
    archive = Source(layout="imagenet21k", archive=place(folder), media="image", units=tuple(units))
    settings = Settings(
        seed=0, samples_per_shard=1000, val_fraction=0.0, classes=None, resized=None
    )
    part = Part(name="all", out=place(folder / "out"))
    making = Making(
        settings, max_bad_fraction=0.0, progress=None, fan_out=elsewhere(part.out, members)
    )
    version = new_version(archive, unit_digests(archive), part, settings)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    (report,) = making.make(archive, part.out, (version,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.samples == members
    assert pool.bytes_allocated() <= before + 2**20
    return peak


def elsewhere(out: Place, members: int) -> Callable[..., Iterator[tuple[int, Any]]]:
    """Tasks whose work is not the driver's: answers as of so many samples in twenty units."""
    rng = np.random.default_rng(0)
    cells = dict.fromkeys(INDEX_SCHEMA.names, 1) | {"media": "jpg", "remark": None, "label": 0}

    def answer(job: Any, item: Any) -> Any:
        if isinstance(job, ShardJob):
            bins, samples = np.unique(rng.integers(0, BINS, members // 20), return_counts=True)
            count = PartCount(samples=members // 20, bytes=members, classes={"c": members // 20})
            return UnitFound(counts=(count,), bins=bins, samples=samples).told()
        shard = ShardRange(**item)
        samples_here = (
            members // work_items
            if shard.number
            else members - members // work_items * (work_items - 1)
        )
        rows = pa.Table.from_pylist(
            [cells | {"key": str(n)} for n in range(samples_here)], INDEX_SCHEMA
        )
        record = ShardRecord(name=shard.name, samples=samples_here, bytes=1, sha256="", version=1)
        side = SideFile(digest="", record=record, repeats=())
        packing._write_side_file(out, shard, side, rows)
        return asdict(Packed(kept=False, samples=samples_here))

    work_items = 0

    def run(
        task: Any, job: Any, work: Sequence[Any], sizes: Sequence[int], kept: Place
    ) -> Iterator[tuple[int, Any]]:
        nonlocal work_items
        work_items = len(work)
        for at, item in enumerate(work):
            yield at, answer(job, item)

    return run
