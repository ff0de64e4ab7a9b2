"""What runs on every training process that Ray Train starts: build, train, tell the driver."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.backends import get_backend
from cluster.mailbox import Mailbox
from pipelines.build import build_run
from pipelines.config import RunConfig
from pipelines.errors import RunError
from pipelines.metrics import MetricRow
from pipelines.train import train

LOCK = ".training.lock"
LOCK_SECONDS = 30.0


def train_worker(argument: dict[str, Any]) -> None:
    """Train a run on this process, as one of several.

    Args:
        argument: `config`, a RunConfig with absolute paths, and `mailbox`. Rank 0 puts metric
            rows into the box as they come, and the outcome at the end.
    """
    config: RunConfig = argument["config"]
    mailbox: Mailbox = argument["mailbox"]
    backend = get_backend(config.parallel.device, threads=config.parallel.threads)
    with _only_training(config.out) if backend.rank == 0 else nullcontext():
        outcome = train(build_run(config, backend, MailboxReporter(mailbox)))
    if backend.rank == 0:
        mailbox.put(outcome)


@contextmanager
def _only_training(run: Path) -> Iterator[None]:
    """Hold the run's lock, so that two trainings never write one run's checkpoints.

    Workers of a killed driver may live on for moments; they are waited for.
    """
    try:
        with FileLock(run / LOCK, timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise RunError(
            f"another training of {run} is under way (it holds {run / LOCK}); wait for its end, or "
            f"name another folder with --out"
        ) from error


class MailboxReporter:
    """Hands metric rows to the driver."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def report(self, row: MetricRow) -> bool:
        """Put the row in the box; True when the driver asks to stop."""
        return self._mailbox.put(row)
