"""The data path through an object store: the same bytes and batches as through local folders."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from cluster.session import ray_session as started_ray
from pipelines.data.batch import Batch
from pipelines.data.manifest import INDEX, MANIFEST, read_manifest
from pipelines.data.order import Position
from pipelines.data.reader import SampleReader
from pipelines.data.settings import OrderConfig, ReadConfig
from pipelines.data.sharding.pack import UNFINISHED
from pipelines.data.sharding.shards import ShardingReport, add_archive, write_shards
from pipelines.data.sources import find_source
from pipelines.data.verify import verify
from pipelines.errors import DatasetError
from pipelines.storage import Place, StorageError
from tests.object_store import S3Server, make_bucket, s3_server
from tests.pipelines.data.streams import START, open_eval, open_train, same

__all__ = ["s3_server"]

PER_SHARD = 7  # of 60 samples: nine shards

# Dies when the third shard is finished.
CHILD = """
import os, signal, sys
from cluster.session import ray_session
from pipelines.data.sharding.shards import write_shards
from pipelines.storage import Place
from pipelines.data.sources import find_source
from tests.pipelines.data.test_object_store import PER_SHARD

def die(stage, done, total):
    if stage == "write" and done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

with ray_session(num_cpus=1):
    source, out = find_source(Place(sys.argv[1])), Place(sys.argv[2])
    write_shards(source, out, samples_per_shard=PER_SHARD, progress=die)
"""


@pytest.fixture(scope="module")
def store(s3_server: S3Server) -> Iterator[Place]:
    """A bucket for the whole module: Ray's processes take the environment that Ray starts with."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield make_bucket(s3_server, monkeypatch)


@pytest.fixture(scope="module")
def ray_session(store: Place) -> Iterator[Place]:
    """Ray with two CPUs, in the environment of the bucket."""
    with started_ray(num_cpus=2):
        yield store


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, make_archive: Callable[..., Path]) -> Place:
    """Three synsets of twenty images."""
    return Place(str(make_archive(tmp_path_factory.mktemp("raw") / "archive")))


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, archive: Place, ray_session: Place
) -> ShardingReport:
    """The archive as shards in a local folder."""
    out = Place(str(tmp_path_factory.mktemp("made") / "out"))
    return write_shards(find_source(archive), out, samples_per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def uploaded(archive: Place, ray_session: Place) -> ShardingReport:
    """The same in the bucket."""
    return write_shards(find_source(archive), ray_session / "made", samples_per_shard=PER_SHARD)


def contents(folder: Place, below: str = "") -> dict[str, bytes]:
    """Every file below a folder."""
    found = {}
    for entry in (folder / below).entries():
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_folder:
            found |= contents(folder, name)
        else:
            found[name] = (folder / name).read_bytes()
    return found


def copied(folder: Place, to: Place) -> Place:
    """A copy of a folder, for tests that change it."""
    for name, content in contents(folder).items():
        (to / name).write_bytes(content)
    return to


class TestSharding:
    def test_shards_in_a_bucket_are_those_of_a_local_folder(
        self, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        assert uploaded.folder == Place(f"{uploaded.folder.parent}/made")
        assert contents(uploaded.folder) == contents(made.folder)
        assert len(uploaded.manifest.shards) == 9
        assert verify(uploaded.folder) == []

    @pytest.mark.slow
    def test_the_archive_may_lie_in_a_bucket(
        self, store: Place, archive: Place, made: ShardingReport
    ) -> None:
        raw = copied(archive, store / "raw/archive")
        write_shards(find_source(raw), store / "from-raw", samples_per_shard=PER_SHARD)
        assert contents(store / "from-raw") == contents(made.folder)

    def test_a_second_run_does_nothing(self, archive: Place, uploaded: ShardingReport) -> None:
        again = write_shards(find_source(archive), uploaded.folder, samples_per_shard=PER_SHARD)
        assert again.did_nothing
        assert again.manifest == read_manifest(uploaded.folder)

    @pytest.mark.slow
    def test_a_killed_run_is_continued_to_the_bytes_of_an_unbroken_one(
        self, store: Place, archive: Place, made: ShardingReport
    ) -> None:
        out = store / "killed"
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(archive), str(out)],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            check=False,
        )
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        assert not (out / MANIFEST).is_file()
        assert (out / UNFINISHED).is_folder()
        report = write_shards(find_source(archive), out, samples_per_shard=PER_SHARD)
        assert report.kept_shards >= 1
        assert contents(out) == contents(made.folder)

    @pytest.mark.slow
    def test_an_archive_is_added_in_a_bucket_as_in_a_local_folder(
        self,
        tmp_path: Path,
        store: Place,
        made: ShardingReport,
        make_archive: Callable[..., Path],
    ) -> None:
        more = find_source(Place(str(make_archive(tmp_path / "archive", images=10, first=15))))
        here, there = (
            copied(made.folder, Place(str(tmp_path / "out"))),
            copied(made.folder, store / "added"),
        )
        add_archive(more, here, samples_per_shard=PER_SHARD)
        report = add_archive(more, there, samples_per_shard=PER_SHARD)
        assert report.manifest.version == 2
        assert report.manifest.samples == 75
        assert contents(there) == contents(here)
        assert verify(there) == []


class TestVerifying:
    def test_changed_and_missing_objects_are_named(
        self, store: Place, made: ShardingReport
    ) -> None:
        folder = copied(made.folder, store / "damaged")
        names = [record.name for record in made.manifest.shards]
        content = bytearray((folder / names[1]).read_bytes())
        content[700] ^= 1
        (folder / names[1]).write_bytes(bytes(content))
        (folder / names[2]).remove()
        problems = verify(folder)
        assert len(problems) == 2
        assert names[1] in problems[0]
        assert names[2] in problems[1]

    def test_a_bucket_that_does_not_exist_is_told(self, store: Place) -> None:
        with pytest.raises(StorageError, match=r"is in a bucket that does not exist"):
            verify(Place(f"{store}-not") / "data")
        with pytest.raises(DatasetError, match=r"nothing is not a finished dataset: it has no"):
            verify(store / "nothing")


def remote(tmp_path: Path, how: str, **changes: object) -> ReadConfig:
    return ReadConfig(remote=how, cache=tmp_path / "cache", **changes)  # type: ignore[arg-type]


def train(folder: Place, count: int, read: ReadConfig, start: Position = START) -> list[Batch]:
    stream = open_train(folder, read=read, order=OrderConfig(lanes=4, window=3))
    try:
        return [batch for batch, _ in islice(stream.batches(start), count)]
    finally:
        stream.close()


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return all(same(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("how", ["shards", "ranges"])
class TestReading:
    def test_samples_are_those_of_a_local_folder(
        self, tmp_path: Path, how: str, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        near = SampleReader(made.folder, ReadConfig())
        far = SampleReader(uploaded.folder, remote(tmp_path, how))
        assert far.num_samples == near.num_samples == 60
        for sample in range(60):
            assert far.read(sample) == near.read(sample)
            assert far.key(sample) == near.key(sample)
        assert far.labels.tolist() == near.labels.tolist()
        near.close()
        far.close()

    def test_training_batches_are_those_of_a_local_folder(
        self, tmp_path: Path, how: str, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        near = train(made.folder, 16, ReadConfig())  # two epochs and a bit
        assert equal(train(uploaded.folder, 16, remote(tmp_path, how)), near)

    def test_a_run_resumes_in_a_bucket(
        self, tmp_path: Path, how: str, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        stream = open_train(made.folder, order=OrderConfig(lanes=4, window=3))
        (_, after), *rest = islice(stream.batches(START), 5)
        stream.close()
        resumed = train(uploaded.folder, 4, remote(tmp_path, how), after)
        assert equal(resumed, [batch for batch, _ in rest])

    def test_evaluation_batches_are_those_of_a_local_folder(
        self, tmp_path: Path, how: str, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        near, far = open_eval(made.folder), open_eval(uploaded.folder, read=remote(tmp_path, how))
        assert equal(list(far), list(near))
        near.close()
        far.close()

    def test_a_changed_object_stops_the_run_by_name(
        self, tmp_path: Path, store: Place, how: str, made: ShardingReport
    ) -> None:
        folder = copied(made.folder, store / f"changed-{how}")
        for record in made.manifest.shards:
            (folder / record.name).write_bytes(bytes(record.bytes))
        wanted = {
            "shards": r"shard-\d+.tar is not the shard .*sha256.*`mone verify s3://",
            "ranges": r"sample '.*' in s3://.*shard-\d+.tar.*crc32",
        }
        with pytest.raises(DatasetError, match=wanted[how]):
            train(folder, 1, remote(tmp_path, how))


class TestCaching:
    def test_every_shard_is_fetched_once_if_all_fit(
        self, tmp_path: Path, uploaded: ShardingReport
    ) -> None:
        train(uploaded.folder, 16, remote(tmp_path, "shards"))
        kept = {path.name[33:] for path in (tmp_path / "cache").iterdir() if path.is_file()}
        assert kept == {record.name for record in read_manifest(uploaded.folder).shards}

    def test_a_small_cache_gives_the_same_batches(
        self, tmp_path: Path, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        most = 8 * max(record.bytes for record in made.manifest.shards)
        assert most < sum(record.bytes for record in made.manifest.shards)
        read = remote(tmp_path, "shards", cache_gib=most / 2**30)
        assert equal(train(uploaded.folder, 16, read), train(made.folder, 16, ReadConfig()))
        held = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file())
        assert held <= most

    def test_a_cache_below_a_shard_is_refused(
        self, tmp_path: Path, uploaded: ShardingReport
    ) -> None:
        with pytest.raises(DatasetError, match=r"data.read.cache_gib of .* is below the largest"):
            SampleReader(uploaded.folder, remote(tmp_path, "shards", cache_gib=1e-6))

    def test_an_index_is_read_from_the_bucket_as_written(
        self, made: ShardingReport, uploaded: ShardingReport
    ) -> None:
        near, far = (report.folder / INDEX for report in (made, uploaded))
        assert far.read_bytes() == near.read_bytes()
