"""Threads that work ahead: results in order, no thread left behind, no failure lost."""

import gc
import threading
import time
from itertools import islice

import pytest

from pipelines.data.loader import Loader
from tests.pipelines.data.streams import working_threads


class Counted:
    """A job that notes which places were filled."""

    def __init__(self, number, places=5, fails_at=None, gate=None):
        self.number, self.places, self.fails_at, self.gate = number, places, fails_at, gate
        self.filled = []

    def fill(self, first, after):
        if self.gate is not None:
            assert self.gate.wait(20)
        for place in range(first, after):
            if place == self.fails_at:
                raise RuntimeError(f"job {self.number} fails at {place}")
            self.filled.append(place)

    def finish(self):
        return self.number


@pytest.mark.parametrize("places", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 2), (8, 5)])
def test_every_place_of_every_job_is_filled_once_and_results_come_in_order(
    places, threads, prefetch
):
    jobs = [Counted(i, places) for i in range(9)]

    results = list(Loader(threads=threads, prefetch=prefetch).run(jobs))

    assert results == list(range(9))
    assert all(sorted(job.filled) == list(range(places)) for job in jobs)
    assert not working_threads()


@pytest.mark.parametrize("prefetch", [1, 3])
def test_as_many_jobs_are_done_ahead_as_asked_and_no_more(prefetch):
    jobs = [Counted(i) for i in range(12)]
    results = Loader(threads=2, prefetch=prefetch).run(iter(jobs))

    assert list(islice(results, 2)) == [0, 1]
    deadline = time.monotonic() + 20
    while len(jobs[1 + prefetch].filled) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # long enough for the threads to go too far, if they would

    assert [len(job.filled) for job in jobs[: 3 + prefetch]] == [5] * (2 + prefetch) + [0]
    results.close()


def test_a_failure_is_raised_when_its_turn_comes_and_ends_the_threads():
    results = Loader(threads=2, prefetch=3).run(
        Counted(i, fails_at=3 if i == 2 else None) for i in range(9)
    )

    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="job 2 fails at 3"):
        next(results)
    assert not working_threads()


def test_a_failure_while_jobs_are_made_ends_the_threads():
    def jobs():
        yield Counted(0)
        yield Counted(1)
        raise RuntimeError("no more jobs")

    results = Loader(threads=2, prefetch=1).run(jobs())

    assert next(results) == 0
    with pytest.raises(RuntimeError, match="no more jobs"):
        next(results)
    assert not working_threads()


def test_closing_while_threads_work_waits_for_the_places_they_are_at_and_no_others():
    gate = threading.Event()
    jobs = [Counted(i, places=8, gate=gate if i else None) for i in range(50)]
    results = Loader(threads=2, prefetch=4).run(jobs)
    assert next(results) == 0

    threading.Timer(0.5, gate.set).start()
    results.close()

    assert not working_threads()
    assert sum(len(job.filled) for job in jobs[1:]) < 4 * 8


def test_results_that_nobody_wants_any_more_end_their_threads():
    results = Loader(threads=2, prefetch=2).run(Counted(i) for i in range(9))
    next(results)
    assert working_threads()

    del results
    gc.collect()

    assert not working_threads()
