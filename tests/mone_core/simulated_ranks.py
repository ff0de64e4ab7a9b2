"""Many ranks in one process, without a network: threads that hand tensors to each other.

They stand in for the ranks of `cluster.backends` where it is tested what is computed, and not
how bytes travel.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

SEED = 7  # of every rank's random numbers
PATIENCE = 60  # seconds; no test waits so long unless ranks disagree on what comes next


class Table:
    """Ranks in rows and columns, a thread each, one of which runs until it has to wait.

    What is sent is the tensor itself and no copy of it: who writes to it later spoils it. Random
    numbers are a rank's own, and start alike.
    """

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
        self.ranks = [OneOfMany(self, rank) for rank in range(rows * columns)]
        self.turn = threading.Condition()
        self.sent = {}  # (row, number of the exchange, column) -> (what, a part for each column)
        self.failed = None

    def run(self, compute):
        """What `compute(rank)` returns, of every rank."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            results = [pool.submit(self._run_one, compute, rank) for rank in self.ranks]
        return [result.result() for result in results]

    def _run_one(self, compute, rank):
        with self.turn:
            torch.manual_seed(SEED)
            try:
                return compute(rank)
            except BaseException as error:
                self.failed = self.failed or error
                self.turn.notify_all()
                raise

    def send(self, row, number, column, what, parts):
        self.sent[row, number, column] = (what, parts)
        self.turn.notify_all()

    def receive(self, row, number, column):
        """The parts for this column, by sender; all of a row must be at the same exchange."""
        keys = [(row, number, sender) for sender in range(self.columns)]
        drawn_so_far = torch.get_rng_state()
        come = self.turn.wait_for(
            lambda: self.failed or all(key in self.sent for key in keys), PATIENCE
        )
        torch.set_rng_state(drawn_so_far)
        if self.failed:
            raise RuntimeError("another rank has failed") from self.failed
        assert come, f"exchange {number} of row {row}: some never came"
        whats, parts = zip(*(self.sent[key] for key in keys), strict=True)
        assert len(set(whats)) == 1, whats
        return [part[column] for part in parts]


class OneOfMany:
    """One rank of a table, and a log of what it was asked to do."""

    def __init__(self, table, rank):
        self.table, self.rank = table, rank
        self.row, self.column = divmod(rank, table.columns)
        self.parts, self.expert_ranks = table.rows * table.columns, table.columns
        self.log, self.handed = [], []

    def share(self, whole, axis):
        assert whole.shape[axis] % self.parts == 0
        return whole.chunk(self.parts, dim=axis)[self.rank]

    def held(self, num_experts):
        each = num_experts // self.expert_ranks
        return range(self.column * each, (self.column + 1) * each)

    def to_experts(self, x_EQd, where):
        return self._exchange("to experts", x_EQd, where, cut=0, joined=1)

    def to_tokens(self, y_EQd, where):
        return self._exchange("to tokens", y_EQd, where, cut=1, joined=0)

    def _exchange(self, way, tensor, where, *, cut, joined):
        assert tensor.shape[cut] % self.expert_ranks == 0
        parts = tensor.chunk(self.expert_ranks, dim=cut)
        what = (way, where, tuple(tensor.shape))
        arrive_parts = self._hand(what, tensor, parts)
        return lambda: torch.cat(arrive_parts(), dim=joined)

    def send_rows(self, rows, sent, come, where):
        assert rows.is_contiguous()
        assert len(sent) == len(come) == self.expert_ranks
        arrive_parts = self._hand(("rows", where), rows, rows.split(list(sent)))

        def arrive():
            parts = arrive_parts()
            assert [len(part) for part in parts] == list(come)
            return torch.cat(parts)

        return arrive

    def _hand(self, what, tensor, parts):
        """To be called for the parts for this rank, by sender."""
        number, (way, where) = len(self.handed), what[:2]
        self.handed.append((way, tensor))
        self.log.append(("send", where))
        self.table.send(self.row, number, self.column, what, parts)

        def arrive():
            received = self.table.receive(self.row, number, self.column)
            self.log.append(("wait", where))
            return received

        return arrive
