"""What runs on every training process that Ray Train starts: build, train, tell the driver."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cluster.backends import get_backend
from cluster.mailbox import Mailbox
from pipelines.build import build_run
from pipelines.config import RunConfig
from pipelines.locks import alone
from pipelines.metrics import MetricRow, append_row
from pipelines.run_data import RunData
from pipelines.train import train

LOCK = ".training.lock"
LOCK_SECONDS = 30.0


def train_worker(argument: dict[str, Any]) -> None:
    """Train a run on this process, as one of several.

    Args:
        argument: `config`, a RunConfig with absolute paths, `data`, the RunData that it began
            with, and `mailbox`. Rank 0 puts metric rows into the box as they come, and the outcome
            at the end.
    """
    config: RunConfig = argument["config"]
    data: RunData = argument["data"]
    mailbox: Mailbox = argument["mailbox"]
    parallel = config.parallel
    backend = get_backend(
        parallel.device,
        threads=parallel.threads,
        expert=parallel.expert,
        timeout_s=parallel.collective_timeout_s,
    )
    # Workers of a killed driver may live on for moments, and write: they are waited for.
    lock = alone(config.out / LOCK, f"training of {config.out}", wait_s=LOCK_SECONDS)
    with lock if backend.rank == 0 else nullcontext():
        backend.barrier("waiting for earlier workers of the run")
        outcome = train(build_run(config, backend, MailboxReporter(config.out, mailbox), data))
    if backend.rank == 0:
        mailbox.put(outcome)


class FileReporter:
    """Writes metric rows to the run's own record, before any checkpoint that follows them."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def report(self, row: MetricRow) -> bool:
        """Append the row; never asks to stop."""
        append_row(self._run, row)
        return False


class MailboxReporter(FileReporter):
    """Also hands the rows to the driver."""

    def __init__(self, run: Path, mailbox: Mailbox) -> None:
        super().__init__(run)
        self._mailbox = mailbox

    def report(self, row: MetricRow) -> bool:
        """Append the row and put it in the box; True when the driver asks to stop."""
        super().report(row)
        return self._mailbox.put(row)
