"""Which member goes where: pure tables, no Ray and no bytes."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.manifest import SourceRecord
from pipelines.data.plan import MEMBERS, ShardJob, mark_repeats, plan_shards, shard_count

JOB = ShardJob(
    archive=Path("raw"),
    out=Path("out"),
    tars=(Path("n01.tar"),),
    source=SourceRecord(name="raw", fingerprint="f", version=1),
    classes=("n01",),
    seed=0,
    samples_per_shard=4,
    max_bad_fraction=0.0,
    first_shard=0,
)


def members(keys: list[str]) -> pa.Table:
    rows = [
        {
            "tar": 0,
            "label": 0,
            "key": key,
            "member": key,
            "offset": 512,
            "size": 9,
            "order": len(key),
        }
        for key in keys
    ]
    return pa.Table.from_struct_array(pa.array(rows, MEMBERS))


@pytest.mark.parametrize(
    ("samples", "mebibytes", "count"),
    [(0, 0, 0), (1, 0, 1), (8, 1, 2), (9, 1, 3), (9, 256, 3), (9, 1025, 5), (2, 5000, 2)],
)
def test_as_few_shards_as_keep_to_both_limits(samples: int, mebibytes: int, count: int) -> None:
    assert shard_count(samples, mebibytes * 2**20, 4) == count


def test_shards_are_cut_evenly_in_the_order_of_the_hash() -> None:
    keys = ["x" * n for n in (3, 1, 9, 4, 2, 5, 8, 7, 6)]
    plan = plan_shards(replace(JOB, first_shard=7), members(keys))
    assert [shard.name for shard in plan] == [f"shard-00000{n}.tar" for n in (7, 8, 9)]
    assert [[len(key) for key in shard.members["key"].to_pylist()] for shard in plan] == [
        [1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
    ]


def test_equal_hashes_are_ordered_by_key() -> None:
    (shard,) = plan_shards(JOB, members(["c", "a", "b"]))
    assert shard.members["key"].to_pylist() == ["a", "b", "c"]


def test_a_plan_is_recognised_by_its_hash() -> None:
    (plan,) = plan_shards(JOB, members(["a", "b"]))
    (again,) = plan_shards(JOB, members(["b", "a"]))
    (other,) = plan_shards(JOB, members(["a", "c"]))
    (labelled,) = plan_shards(replace(JOB, classes=("n00", "n01")), members(["a", "b"]))
    assert plan.digest == again.digest
    assert len({plan.digest, other.digest, labelled.digest}) == 3


def test_the_first_of_several_equal_keys_stays() -> None:
    marked = mark_repeats(members(["a", "b", "a", "c"]), pa.chunked_array([["c"]], pa.string()))
    assert marked["problem"].to_pylist() == [
        None,
        None,
        "has the key of an earlier member",
        "is in the dataset already (same key)",
    ]
