"""Writing one shard: exact bytes, and nothing half-made where it fails."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset

from pipelines.data.manifest import SourceRecord
from pipelines.data.pack import UNFINISHED, read_side_file, write_shard
from pipelines.data.plan import MEMBERS, ShardJob, plan_shards, tar_rows

NAMES = ["n01_0", "n01_" + "long" * 40, "n01_é"]


@pytest.fixture
def job(tmp_path: Path, write_tar: Callable[..., Path], jpeg: Callable[[int], bytes]) -> ShardJob:
    files = {f"{name}.JPEG": jpeg(n) for n, name in enumerate(NAMES)}
    tar = write_tar(tmp_path / "n01.tar", files)
    (tmp_path / "out" / UNFINISHED).mkdir(parents=True)
    return ShardJob(
        archive=tmp_path,
        out=tmp_path / "out",
        tars=(tar,),
        source=SourceRecord(name="raw", fingerprint="f", version=1),
        classes=("n01",),
        seed=0,
        samples_per_shard=10,
        max_bad_fraction=0.0,
        first_shard=0,
    )


@pytest.fixture
def shard(job: ShardJob) -> dict[str, object]:
    """The plan of one shard, as a task gets it."""
    members = pa.Table.from_struct_array(pa.array(tar_rows(job, 0), MEMBERS))
    (planned,) = plan_shards(job, members)
    (row,) = planned.work().to_pylist()
    return dict(row)


def test_long_and_foreign_names_are_read_back_from_where_the_index_says(
    job: ShardJob, shard: dict[str, object], jpeg: Callable[[int], bytes]
) -> None:
    write_shard(job, shard)
    path = job.out / "shard-000000.tar"
    samples = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    images = {name: jpeg(n) for n, name in enumerate(NAMES)}
    assert {sample["__key__"]: sample["jpg"] for sample in samples} == images
    _, record, index = read_side_file(job, "shard-000000.tar")
    content = path.read_bytes()
    assert (record.bytes, record.samples) == (len(content), 3)
    for row in index.to_pylist():
        start = row["jpg_offset"]
        assert content[start : start + row["jpg_size"]] == images[row["key"]]


def test_writing_again_gives_the_same_bytes(job: ShardJob, shard: dict[str, object]) -> None:
    write_shard(job, shard)
    first = (job.out / "shard-000000.tar").read_bytes()
    write_shard(job, shard)
    assert (job.out / "shard-000000.tar").read_bytes() == first


def test_a_shard_that_fails_leaves_nothing(job: ShardJob, shard: dict[str, object]) -> None:
    job.tars[0].write_bytes(job.tars[0].read_bytes()[:600])
    with pytest.raises(OSError, match=r"n01\.tar became shorter while it was read"):
        write_shard(job, shard)
    assert [path.name for path in job.out.iterdir()] == [UNFINISHED]
    assert list((job.out / UNFINISHED).iterdir()) == []
