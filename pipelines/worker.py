"""What runs on every training process that Ray Train starts: build, train, tell the driver."""

from typing import Any

from cluster.backends import get_backend
from cluster.mailbox import Mailbox
from pipelines.build import build_run
from pipelines.config import RunConfig
from pipelines.metrics import MetricRow
from pipelines.train import train


def train_worker(argument: dict[str, Any]) -> None:
    """Train a run on this process, as one of several.

    Args:
        argument: `config`, a RunConfig with absolute paths, and `mailbox`. Rank 0 puts metric
            rows into the box as they come, and the outcome at the end.
    """
    config: RunConfig = argument["config"]
    mailbox: Mailbox = argument["mailbox"]
    backend = get_backend(config.parallel.device, threads=config.parallel.threads)
    outcome = train(build_run(config, backend, MailboxReporter(mailbox)))
    if backend.rank == 0:
        mailbox.put(outcome)


class MailboxReporter:
    """Hands metric rows to the driver."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def report(self, row: MetricRow) -> bool:
        """Put the row in the box; True when the driver asks to stop."""
        return self._mailbox.put(row)
