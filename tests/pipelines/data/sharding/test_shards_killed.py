"""What a run leaves that was killed at a bad moment, and that the same run again puts right.

Tasks run in this process, one after the other, so that the moment can be chosen.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.shards import add_archive, write_parts, write_shards
from pipelines.data.verify import verify
from tests.pipelines.data.sharding.sharded import contents, place, source

MakeArchive = Callable[..., Path]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turn(
        task: Callable[[Any, Any], Any], job: Any, work: Sequence[Any], *_: Any
    ) -> Iterator[tuple[int, Any]]:
        yield from ((at, task(job, item)) for at, item in enumerate(work))

    monkeypatch.setattr("pipelines.data.sharding.shards._fan_out", in_turn)


def die(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_killed_right_after_a_part_s_first_shard_is_continued(
    tmp_path: Path, archive: Path
) -> None:
    out = place(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.sharding.pack._write_side_file", die)
        with pytest.raises(KeyboardInterrupt):
            write_parts(source(archive), out, val_fraction=0.2)
    assert list((tmp_path / "out/train").glob("shard-*.tar"))
    assert not list((tmp_path / "out").rglob("shard-*.parquet"))
    train, val = write_parts(source(archive), out, val_fraction=0.2)
    assert (train.samples + val.samples, train.did_nothing, val.did_nothing) == (60, False, False)
    assert verify(train.folder) == verify(val.folder) == []


def test_what_a_run_leaves_that_was_killed_at_its_very_end_is_removed_by_the_next(
    tmp_path: Path, archive: Path
) -> None:
    out, left = tmp_path / "out", tmp_path / "left"
    folders = (".", "train", "val")

    def keep(stage: str, done: int, total: int) -> None:
        if stage == "write" and done == total:
            for name in folders:
                shutil.copytree(out / name / UNFINISHED, left / name / UNFINISHED)

    write_parts(source(archive), place(out), val_fraction=0.2, progress=keep)
    whole = contents(out)
    shutil.copytree(left, out, dirs_exist_ok=True)
    shutil.rmtree(out / "train" / UNFINISHED)  # as far as the removing came
    assert contents(out) != whole
    again = write_parts(source(archive), place(out), val_fraction=0.2)
    assert [report.did_nothing for report in again] == [True, True]
    assert contents(out) == whole
    assert not list(out.rglob(UNFINISHED))


def test_a_run_that_has_nothing_to_do_leaves_alone_what_is_unfinished_of_another(
    tmp_path: Path, archive: Path, make_archive: MakeArchive
) -> None:
    out = place(tmp_path / "out")
    write_shards(source(archive), out)
    new = source(make_archive(tmp_path / "new", images=5, first=50))

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("write", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_archive(new, out, samples_per_shard=4, progress=interrupt)
    before = contents(tmp_path / "out")
    assert write_shards(source(archive), out).did_nothing
    assert contents(tmp_path / "out") == before
    assert add_archive(new, out, samples_per_shard=4).kept_shards == 2
    assert not (tmp_path / "out" / UNFINISHED).exists()
