"""Training batches that Ray Data decodes anywhere in the cluster: `--data.reader ray`.

For hosts whose processors cannot feed their accelerators. `RayStream` is a `TrainStream`, with the
same order, pixels and positions, whose rows are filled elsewhere: one execution of Ray Data per
rank sends descriptions of work (epoch, step, some places of a batch) to actors that hold a
`TrainStream` of their own, and rows come back in order. Which sample is read when is the subject of
`stream` and `order`, and a sample that is skipped counts against the budget of the rank that asked.

The source of the work is one task without end, held back by `_Pace`: never more than
`data.read.prefetch` batches beyond the one in use are on their way, whatever room the object store
has, and a batch is copied out of it as it comes. Actors belong to the process that trains: they
end when the iterator is closed or that process dies. Where the cluster has no CPU for any of
them, the run ends with a message instead of waiting for ever.
"""

import asyncio
import itertools
import json
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError

from pipelines.data.batch import Batch
from pipelines.data.order import Position
from pipelines.data.rows import Skipped
from pipelines.data.settings import OrderConfig, RowConfig
from pipelines.data.stream import TrainStream
from pipelines.errors import DatasetError, PipelineError, RunError
from pipelines.storage import Place

_BEGUN_WITHIN_S = 120.0
# A piece of work costs Ray Data some milliseconds, as much as decoding a few images.
_LEAST_IMAGES = 16


class RayStream(TrainStream):
    """Endless training batches of one rank, the same as of `TrainStream`, decoded by Ray.

    `data.read.threads` is the number of decoding processes for this rank, a CPU each.
    """

    def __init__(
        self,
        folder: Place,
        config: RowConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        order: OrderConfig,
        host_ranks: int = 1,
        digest: str | None = None,
    ) -> None:
        """Open a dataset for training; Ray runs already, and every machine sees the folder.

        Args and errors are those of `TrainStream`.

        Raises:
            RunError: Also if the batches on their way do not fit into Ray's object store.
        """
        self._recipe: dict[str, Any] = {
            "folder": folder.absolute(),
            "config": config,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world": world,
            "order": order,
            "host_ranks": host_ranks,
            "digest": digest,
        }
        super().__init__(**self._recipe)
        # Decoders open the folder later, and again when Ray restarts them: still this dataset.
        self._recipe["digest"] = self._reader.manifest.digest
        self._actors, self._prefetch = config.read.threads, config.read.prefetch
        self._rows_each = _LEAST_IMAGES // min(config.frames, _LEAST_IMAGES)
        rows = self._rows + config.augment.mixed - 1
        _check_object_store(rows * int(np.prod(self._shape)), self._prefetch, world)

    def batches(self, start: Position) -> Generator[tuple[Batch, Position], None, None]:
        """Batches from a position on, as of `TrainStream`; closing the iterator frees the CPUs.

        Raises:
            RunError: Also if the cluster does not have the CPUs, once the first batch is asked for.
        """
        super().batches(start).close()  # refuses what it refuses; not a thread has begun
        return self._batches(start)

    def _batches(self, position: Position) -> Generator[tuple[Batch, Position], None, None]:
        pieces = self._pieces(position)
        work = _Work(position, steps_per_epoch=self.steps_per_epoch, pieces=pieces)
        with _decoded(work, self._recipe, self._actors, self._prefetch) as (results, pace):
            received = itertools.chain([_first(results, pace, self._actors)], results)
            while True:
                after = position.after(steps_per_epoch=self.steps_per_epoch)
                job = self._job(position.epoch, position.step, after)
                for first, end in pieces:
                    self._receive(job, first, end, next(received))
                yield job.finish()
                position = after
                pace.taken.remote()

    def _pieces(self, position: Position) -> list[tuple[int, int]]:
        """The places of a batch, the same for every batch, in pieces for the actors."""
        places = self._job(position.epoch, position.step, position).places
        count = min(self._actors, max(1, places // self._rows_each))
        return list(itertools.pairwise(places * i // count for i in range(count + 1)))

    def _receive(self, job: Any, first: int, end: int, piece: pa.Table) -> None:
        """Write what an actor has made into the batch, and count what it skipped."""
        told = json.loads(piece["told"][0].as_py())
        if "error" in told:
            raise DatasetError(told["error"])
        self._maker.damage.read(end - first)
        for row, name, why in told["skipped"]:
            self._maker.damage.skip(name, why)
            job.bad[row] = Skipped(name, why)
        for column, target in _columns(job, first, end).items():
            source = np.frombuffer(piece[column][0].as_buffer(), target.dtype)
            target[...] = source.reshape(target.shape)


class _Decoder:
    """What an actor of Ray Data holds: a stream of its own, opened once, which fills places."""

    def __init__(self, recipe: dict[str, Any], pace: Any) -> None:
        pace.begun.remote()
        # The budget is kept where all of a rank's rows arrive.
        read = replace(recipe["config"].read, threads=1, prefetch=1, corrupt_share=1.0)
        self._recipe = recipe | {"config": replace(recipe["config"], read=read)}
        self._stream: _Remote | None = None

    def __call__(self, work: pa.Table) -> pa.Table:
        """A piece of a batch, or the message of what a user can mend."""
        (piece,) = work.to_pylist()
        try:
            if self._stream is None:
                self._stream = _opened(self._recipe)
            return self._stream.piece(**piece)
        except PipelineError as error:
            return _packed({"pixels": b"", "labels": b"", "mix": b""}, {"error": str(error)})


class _Remote(TrainStream):
    """A stream in an actor: it makes some places of a batch and not the rest."""

    _fetched: tuple[int, int] | None = None

    def piece(self, *, epoch: int, step: int, first: int, end: int) -> pa.Table:
        """Places from `first` on up to the one before `end`, and what was skipped among them."""
        window = (epoch, self._order.window_of(step))
        if window != self._fetched:
            self._fetched = window
            self._reader.prefetch(self._order.shards_ahead(epoch, step, *self._read_rows))
        job = self._job(epoch, step, Position(seed=self._order.seed, epoch=epoch, step=step))
        job.fill(first, end)
        skipped = [(row, *what) for row, what in job.bad.items()]
        return _packed(_columns(job, first, end), {"skipped": skipped})


def _opened(recipe: dict[str, Any]) -> _Remote:
    """The actor's stream.

    Raises:
        DatasetError: This machine does not see what the training process saw.
    """
    try:
        return _Remote(**recipe)
    except PipelineError as error:
        machine = ray.util.get_node_ip_address()
        raise DatasetError(
            f"the decoding process on {machine} cannot open the data that training has opened: "
            f"{error}"
        ) from error


class _Work(Datasource):  # type: ignore[misc]  # Ray Data comes without types
    """Descriptions of pieces of batches without end, from a position on."""

    def __init__(
        self, start: Position, *, steps_per_epoch: int, pieces: list[tuple[int, int]]
    ) -> None:
        self._start, self._steps_per_epoch, self._pieces = start, steps_per_epoch, pieces
        self.pace: Any = None

    def get_name(self) -> str:
        """What Ray calls the task."""
        return "Order"

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: it does not end."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._rows, unknown)]

    def _rows(self) -> Iterable[pa.Table]:
        position = self._start
        for batch in itertools.count():
            ray.get(self.pace.until.remote(batch))
            for first, end in self._pieces:
                piece = {"epoch": position.epoch, "step": position.step, "first": first, "end": end}
                yield pa.Table.from_pylist([piece])
            position = position.after(steps_per_epoch=self._steps_per_epoch)


class _Pace:
    """Lets the source run so many batches ahead of those that were taken, and no further.

    Decoders tell it that they have begun: that they have got their CPU.
    """

    def __init__(self, ahead: int) -> None:
        self._limit, self._moved = 1 + ahead, asyncio.Condition()
        self._begun = False

    async def begun(self) -> None:
        """Tell that a decoder runs."""
        self._begun = True

    async def has_begun(self) -> bool:
        """Whether any decoder runs, or did."""
        return self._begun

    async def until(self, batch: int) -> None:
        """Wait until a batch may be begun."""
        async with self._moved:
            await self._moved.wait_for(lambda: batch < self._limit)

    async def taken(self) -> None:
        """Tell that one more batch was taken and is used up."""
        async with self._moved:
            self._limit += 1
            self._moved.notify_all()


@contextmanager
def _decoded(
    work: _Work, recipe: dict[str, Any], actors: int, prefetch: int
) -> Iterator[tuple[Iterator[pa.Table], Any]]:
    """The pieces of the work in its order, and the actor to tell of every batch that was taken."""
    # Not "DEFAULT", which inside a placement group means on its own CPUs: those of training.
    pace = ray.remote(_Pace).options(num_cpus=0, scheduling_strategy="SPREAD").remote(prefetch)
    work.pace = pace
    dataset = ray.data.read_datasource(work, override_num_blocks=1, num_cpus=0).map_batches(
        _Decoder,
        fn_constructor_args=(recipe, pace),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    dataset.context.target_max_block_size = 1  # bytes: every row leaves its task by itself
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    pieces = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with closing(iter(pieces)) as results:
        yield results, pace


def _first(results: Iterator[pa.Table], pace: Any, actors: int) -> pa.Table:
    """The first piece of work that comes back, however long it takes to fetch and decode.

    Raises:
        RunError: No decoder began in time.
    """
    late = threading.Event()

    def give_up() -> None:
        if not ray.get(pace.has_begun.remote()):
            late.set()
            ray.kill(pace)  # ends the source with an error, and so the execution

    watch = threading.Timer(_BEGUN_WITHIN_S, give_up)
    watch.start()
    try:
        return next(results)
    except RayError as error:
        if not late.is_set():
            raise
        free = ray.available_resources().get("CPU", 0)
        total = ray.cluster_resources().get("CPU", 0)
        raise RunError(
            f"none of the {actors} decoding processes of data.reader ray (data.read.threads, a CPU "
            f"each) began within {_BEGUN_WITHIN_S:g} s; of the Ray cluster's {total:g} "
            f"CPUs {free:g} are free: give it more CPUs than training holds, lower "
            "data.read.threads so that every worker gets some, or set data.reader to threads"
        ) from error
    finally:
        watch.cancel()
        watch.join()  # it may be asking just now


def _columns(job: Any, first: int, end: int) -> dict[str, Any]:
    """The parts of a batch's arrays that some places fill; empty without mixup: `mix`."""
    rows = slice(first + job.repeated, end + job.repeated)
    mix = np.empty((0,), np.float32)
    if job.mix_BM is not None:
        before = len(job.samples) - len(job.mix_BM)
        mix = job.mix_BM[max(0, rows.start - before) : max(0, rows.stop - before)]
    return {"pixels": job.pixels_RTHWC[rows], "labels": job.labels_R[rows], "mix": mix}


def _packed(columns: dict[str, Any], told: dict[str, Any]) -> pa.Table:
    """One row: arrays as the bytes they are, not copied, and the rest as JSON."""
    packed = {name: _bytes_array(pa.py_buffer(array)) for name, array in columns.items()}
    return pa.table(packed | {"told": [json.dumps(told)]})


def _bytes_array(content: pa.Buffer) -> pa.Array:
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, content])


def _check_object_store(batch_bytes: int, prefetch: int, world: int) -> None:
    """Refuse batches that the object store would write to disk while they wait."""
    wanted = batch_bytes * (1 + prefetch) * world
    room = ray.cluster_resources().get("object_store_memory", 0)
    if wanted > room:
        raise RunError(
            f"data.read.prefetch {prefetch} means {wanted / 2**20:.0f} MiB of batches on their way "
            f"to all workers, and Ray's object store has {room / 2**20:.0f} MiB; set "
            "data.read.prefetch or train.batch_size to less, or data.reader to threads"
        )
