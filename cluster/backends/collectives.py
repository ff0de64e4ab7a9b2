"""What ranks do together through torch.distributed, with errors that say who was at what.

Sums are sums: an average would hide a divisor in here (and gloo has none). The parts of an
all-to-all are equal, or both sides give their sizes: no sizes are exchanged in here, and nobody
waits for a number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import CollectiveError


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that do something together, this one among them.

    Attributes:
        ranks: Their numbers, in the order of their parts.
        handle: What torch knows them by; None where there is one process alone.
    """

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return len(self.ranks) == 1


class Collectives:
    """The collectives of one rank.

    Args:
        rank: Its number, for errors.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.sent_bytes = 0

    def start_sum(self, values: Tensor, group: Group, what: str) -> Callable[[], None]:
        """Begin to replace `values` by their sum over the group; the call waits for it."""
        if group.alone:
            return lambda: None
        with self._named(what):
            work = dist.all_reduce(values, group=group.handle, async_op=True)
        return lambda: self._wait(work, what)

    def sum(self, values: Tensor, group: Group, what: str) -> Tensor:
        """The sum of the group's values; the same bits on all of its ranks."""
        total = values.clone()
        self.start_sum(total, group, what)()
        return total

    def broadcast(self, values: Tensor, group: Group, what: str) -> None:
        """Replace `values` by those of the group's first rank."""
        if not group.alone:
            with self._named(what):
                dist.broadcast(values, src=group.ranks[0], group=group.handle)

    def start_all_to_all(
        self,
        sent: Tensor,
        group: Group,
        what: str,
        sizes: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> Callable[[], Tensor]:
        """Begin to send one part of the first axis to each rank of the group.

        Args:
            sent: Contiguous; its first axis is the group's ranks, or parts of the given sizes
                in the order of ranks. Not to be written until the call has returned.
            sizes: Of the first axis, what goes to each rank and what comes from each; 0 is a size.

        Returns:
            To be called for what the others sent here, in their order; of the same shape where
            parts are equal.
        """
        self.sent_bytes += sent.nbytes
        goes, comes = sizes or (None, None)
        received = sent.new_empty(len(sent) if comes is None else sum(comes), *sent.shape[1:])
        with self._named(what):
            work = dist.all_to_all_single(
                received, sent, comes, goes, group=group.handle, async_op=True
            )

        def arrive() -> Tensor:
            self._wait(work, what)
            return received

        return arrive

    def barrier(self, group: Group, what: str) -> None:
        """Wait until all ranks of the group are here."""
        if not group.alone:
            with self._named(what):
                dist.barrier(group=group.handle)

    def _wait(self, work: dist.Work, what: str) -> None:
        with self._named(what):
            work.wait()

    def _named(self, what: str) -> AbstractContextManager[None]:
        return named_failure(self._rank, what)


@contextmanager
def named_failure(rank: int, what: str) -> Iterator[None]:
    """Say who was at what when other ranks were lost.

    Torch reports a lost or late rank as some RuntimeError of its transport; what this rank's own
    device reports stays what it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CollectiveError(
            f"rank {rank}: {what} did not complete; another rank failed, hangs or is slower than "
            f"parallel.collective_timeout_s allows ({reason})"
        ) from error
