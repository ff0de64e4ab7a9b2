"""Batches that Ray decodes are those that threads decode; bounds, ends, messages; a real Ray."""

import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image

from pipelines.data import ray_reader
from pipelines.data.batch import Batch
from pipelines.data.order import Position
from pipelines.data.ray_reader import RayStream
from pipelines.data.settings import AugmentConfig, OrderConfig, ReadConfig
from pipelines.data.stream import TrainStream
from pipelines.errors import DatasetError, RunError
from pipelines.storage import Place
from tests.pipelines.data.streams import ROWS, same

pytestmark = pytest.mark.usefixtures("ray_session")

SEED, STEPS = 3, 5
START = Position(seed=SEED, epoch=0, step=0)


@pytest.fixture
def arguments(
    make_dataset: Callable[..., Path],
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
) -> dict[str, Any]:
    """What both streams are made of: five batches of eight and three samples over, with mixup."""
    folder = make_dataset([encode(noise(24, 20, seed=i)) for i in range(8 * STEPS + 3)])
    return {
        "folder": Place(str(folder)),
        "config": replace(
            ROWS, read=ReadConfig(threads=2, prefetch=2), augment=AugmentConfig(mixup=0.5)
        ),
        "batch_size": 8,
        "seed": SEED,
        "rank": 0,
        "world": 1,
        "order": OrderConfig(lanes=2, window=4),
    }


@pytest.mark.parametrize("start", [pytest.param((0, 0), marks=pytest.mark.slow), (2, STEPS - 1)])
def test_batches_are_those_of_threads_to_the_bit_from_any_position(
    arguments: dict[str, Any], start: tuple[int, int]
):
    position = Position(seed=SEED, epoch=start[0], step=start[1])

    assert_same(taken(RayStream(**arguments), position, 7), taken_by_threads(arguments, position))


@pytest.mark.slow
def test_ranks_share_the_cluster_and_each_gets_its_own_rows(arguments: dict[str, Any]):
    arguments = with_rows(arguments, read=ReadConfig(threads=1)) | {"world": 2}
    both = [RayStream(**(arguments | {"rank": rank})) for rank in range(2)]

    with closing(both[0].batches(START)) as one, closing(both[1].batches(START)) as two:
        pairs = list(islice(zip(one, two, strict=True), 7))

    for rank, batches in enumerate(zip(*pairs, strict=True)):
        assert_same(batches, taken_by_threads(arguments | {"rank": rank}, START))


@pytest.mark.slow
def test_closing_early_gives_the_cpus_back(arguments: dict[str, Any]):
    with closing(RayStream(**arguments).batches(START)) as batches:
        next(batches)
        assert ray.available_resources().get("CPU", 0) == 0

    assert_cpus_come_back()


@pytest.mark.slow
def test_a_training_process_that_dies_leaves_no_cpu_taken(arguments: dict[str, Any]):
    worker = ray.remote(_Worker).options(num_cpus=0).remote(arguments)
    ray.get(worker.step.remote())
    assert ray.available_resources().get("CPU", 0) == 0

    ray.kill(worker)

    assert_cpus_come_back()


def test_a_sample_that_does_not_decode_ends_it_with_the_same_line(arguments: dict[str, Any]):
    sample = damage(arguments)

    told = []
    for stream in (TrainStream(**arguments), RayStream(**arguments)):
        with pytest.raises(DatasetError, match=rf"sample 'key_{sample}' in .*crc32") as caught:
            taken(stream, START, STEPS)
        told.append(str(caught.value))

    assert told[0] == told[1]
    assert_cpus_come_back()


@pytest.mark.slow
def test_a_sample_that_may_be_skipped_is_replaced_and_counted_alike(arguments: dict[str, Any]):
    damage(arguments)
    read = ReadConfig(threads=2, on_corrupt="skip", corrupt_share=0.2)
    arguments = with_rows(arguments, read=read)
    threads, remote = TrainStream(**arguments), RayStream(**arguments)

    assert_same(taken(remote, START, STEPS), taken(threads, START, STEPS))

    assert remote.skipped == threads.skipped == 1
    assert remote.skipped_samples == threads.skipped_samples


@pytest.mark.slow
def test_skipping_too_many_ends_it_on_the_rank_that_asked(arguments: dict[str, Any]):
    damage(arguments)
    read = ReadConfig(threads=2, on_corrupt="skip", corrupt_share=0.001)
    arguments = with_rows(arguments, read=read)

    with pytest.raises(DatasetError, match=r"1 of 40 samples were skipped, more than data\.read"):
        taken(RayStream(**arguments), START, STEPS)


@pytest.mark.slow
def test_without_a_cpu_it_says_so_instead_of_waiting(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_reader, "_BEGUN_WITHIN_S", 3.0)
    training = ray.remote(_Worker).options(num_cpus=2).remote(arguments)
    ray.get(training.__ray_ready__.remote())

    with pytest.raises(RunError, match=r"none of the 2 .* began within 3 s; .* 2 CPUs 0 are free"):
        taken(RayStream(**arguments), START, 1)

    ray.kill(training)
    assert_cpus_come_back()


def test_a_decoder_that_has_begun_may_take_its_time(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_reader, "_BEGUN_WITHIN_S", 0.1)
    pace = ray.remote(ray_reader._Pace).options(num_cpus=0).remote(2)
    assert not ray.get(pace.has_begun.remote())
    ray_reader._Decoder(arguments, pace)

    def fetched_late() -> Iterator[str]:
        time.sleep(0.4)
        yield "the first piece"

    assert ray_reader._first(fetched_late(), pace, 2) == "the first piece"
    assert ray.get(pace.has_begun.remote())  # nobody has ended it
    ray.kill(pace)


def test_more_batches_ahead_than_the_object_store_holds_are_refused(arguments: dict[str, Any]):
    arguments = with_rows(arguments, read=ReadConfig(prefetch=10**6))

    with pytest.raises(RunError, match=r"data\.read\.prefetch 1000000 means .* object store has"):
        RayStream(**arguments)


def test_a_position_of_another_seed_is_refused_before_a_cpu_is_taken(arguments: dict[str, Any]):
    with pytest.raises(RunError, match="the data position was made with seed 4"):
        RayStream(**arguments).batches(replace(START, seed=4))


def test_a_machine_that_does_not_see_the_data_says_which_and_why(arguments: dict[str, Any]):
    missing = arguments | {"folder": arguments["folder"] / "not there"}

    with pytest.raises(DatasetError, match=r"decoding process on .* cannot open .*not a finished"):
        ray_reader._opened(missing)


def test_a_decoder_that_begins_once_the_data_have_changed_says_so(
    arguments: dict[str, Any],
    make_dataset: Callable[..., Path],
    noise: Callable[..., Image.Image],
    encode: Callable[..., bytes],
):
    with closing(RayStream(**arguments)) as stream:
        shutil.rmtree(str(arguments["folder"]))
        make_dataset([encode(noise(24, 20, seed=i)) for i in range(60)])

        with pytest.raises(DatasetError, match=r"decoding process on .* changed since the run beg"):
            ray_reader._opened(stream._recipe)


def test_work_waits_until_batches_are_taken():
    pace = ray.remote(ray_reader._Pace).options(num_cpus=0).remote(2)
    fourth = pace.until.remote(3)

    assert ray.wait([pace.until.remote(2)], timeout=30)[0]
    assert not ray.wait([fourth], timeout=1)[0]
    pace.taken.remote()
    assert ray.wait([fourth], timeout=30)[0]
    ray.kill(pace)


class _Worker:
    """A training process that reads one batch and keeps the stream open."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._batches = RayStream(**arguments).batches(START)

    def step(self) -> None:
        """Read a batch."""
        next(self._batches)


def taken(stream: TrainStream, start: Position, count: int) -> list[tuple[Batch, Position]]:
    """Some batches of a stream, which is closed then."""
    with closing(stream), closing(stream.batches(start)) as batches:
        return list(islice(batches, count))


def taken_by_threads(arguments: dict[str, Any], start: Position) -> list[tuple[Batch, Position]]:
    """What is expected: seven batches of the stream that has threads."""
    return taken(TrainStream(**arguments), start, 7)


def assert_same(found: Any, expected: Any) -> None:
    """Batches and positions are equal, to the bit."""
    assert len(found) == len(expected)
    for (batch, after), (wanted, wanted_after) in zip(found, expected, strict=True):
        assert after == wanted_after
        assert same(batch, wanted)


def assert_cpus_come_back() -> None:
    """Ray has both its CPUs again, soon."""
    for free in _free_cpus():
        if free == 2:
            return
    pytest.fail("CPUs are still taken")


def _free_cpus() -> Iterator[float]:
    for _ in range(240):
        yield ray.available_resources().get("CPU", 0)
        time.sleep(0.25)


def with_rows(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments with changed rows."""
    return arguments | {"config": replace(arguments["config"], **changes)}


def damage(arguments: dict[str, Any]) -> int:
    """Change a byte of a sample of the second batch; gives the sample, which is its label too."""
    (_, (batch, _)) = taken(TrainStream(**arguments), START, 2)
    sample = int(batch.labels_R[-1])
    for path in Path(str(arguments["folder"])).glob("*.tar"):
        with tarfile.open(path) as tar:
            found = [member for member in tar if member.name == f"key_{sample}.jpg"]
        for member in found:
            with path.open("r+b") as file:
                file.seek(member.offset_data + member.size // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 0xFF]))
    return sample
