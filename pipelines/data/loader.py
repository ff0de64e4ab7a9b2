"""Threads that fill batches ahead of whoever uses them, in order.

A `Job` is one batch with places to fill; which sample belongs in a place is `stream`'s subject.
Threads, not processes: decoders let go of the interpreter's lock, and rows are written where the
batch will be read.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

Result = TypeVar("Result", covariant=True)

# Places are handed to threads in pieces: enough of them to even out large and small images,
# few enough that handing over costs little beside a 32-pixel image.
_PIECES_PER_THREAD = 4


class Job(Protocol[Result]):
    """One batch to make."""

    @property
    def places(self) -> int:
        """How many places there are to fill."""

    def fill(self, first: int, after: int) -> None:
        """Fill the places from `first` on up to the one before `after`; called in threads."""

    def finish(self) -> Result:
        """What to hand out once all places are filled."""


class Loader:
    """Does jobs in `threads` threads, `prefetch` of them ahead of whoever takes the results."""

    def __init__(self, *, threads: int, prefetch: int) -> None:
        self._threads, self._prefetch = threads, prefetch

    def run(self, jobs: Iterable[Job[Result]]) -> Generator[Result, None, None]:
        """Results of the jobs, in their order.

        What a thread raises is raised here when its job's turn comes. Closing the generator, or
        letting go of it, ends the threads after the places that they are at.
        """
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        started: deque[tuple[Job[Result], list[Future[None]]]] = deque()
        try:
            for job in jobs:
                started.append((job, self._start(pool, job)))
                if len(started) > self._prefetch:
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, job: Job[Result]) -> list[Future[None]]:
        piece = max(1, job.places // (self._threads * _PIECES_PER_THREAD))
        return [
            pool.submit(job.fill, first, min(first + piece, job.places))
            for first in range(0, job.places, piece)
        ]


def _finished(job: Job[Result], pieces: list[Future[None]]) -> Result:
    for piece in pieces:
        piece.result()
    return job.finish()
