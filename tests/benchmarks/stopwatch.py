"""Where the time of a layer on many ranks goes: marks at its parts, on the device's own clock.

`watch` marks the expert bank and `TimedRanks` the exchange in it; what is run as `Timed`
remembers the marks. Nothing is measured outside of a `Timed` run.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.backends import Backend
from mone_core.bank import ExpertBank
from mone_core.ranks import Arriving
from tests.benchmarks.harness import Run

PARTS = ("layer", "bank", "exchange")  # each in the one before


class Stopwatch:
    """What parts of a run take, on CUDA by the device's clock: the host runs ahead of it."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self.marks: dict[str, list] | None = None  # None: nobody is measuring

    def tick(self, part: str) -> None:
        """A part begins; or, if it has begun, ends."""
        if self.marks is not None:
            self.marks[part].append(self._now())

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return 1e3 * time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=True)  # external: in graphs too
        event.record()
        return event


class Timed:
    """A run that remembers its parts. Captured in a graph, it does so at every replay."""

    def __init__(self, run: Run, stopwatch: Stopwatch) -> None:
        self._run, self._stopwatch = run, stopwatch
        self._marks: dict[str, list] = {}

    def __call__(self) -> None:
        self._marks = self._stopwatch.marks = defaultdict(list)
        self._stopwatch.tick("layer")
        self._run()
        self._stopwatch.tick("layer")
        self._stopwatch.marks = None

    def milliseconds(self) -> list[float]:
        """Of the last run, in the order of `PARTS`; the device must have finished it."""
        return [
            sum(map(_between, self._marks[part][::2], self._marks[part][1::2])) for part in PARTS
        ]


class TimedRanks:
    """Ranks whose exchange is timed."""

    def __init__(self, ranks: Backend, stopwatch: Stopwatch) -> None:
        self.parts, self.expert_ranks = ranks.parts, ranks.expert_ranks
        self.share, self.held = ranks.share, ranks.held
        self._ranks, self._stopwatch = ranks, stopwatch

    def to_experts(self, x_EQd: Tensor, where: str) -> Arriving:
        return self._timed(self._ranks.to_experts, x_EQd, where)

    def to_tokens(self, y_EQd: Tensor, where: str) -> Arriving:
        return self._timed(self._ranks.to_tokens, y_EQd, where)

    def _timed(
        self, send: Callable[[Tensor, str], Arriving], slots: Tensor, where: str
    ) -> Arriving:
        self._stopwatch.tick("exchange")
        arrive = send(slots, where)
        self._stopwatch.tick("exchange")

        def timed() -> Tensor:
            self._stopwatch.tick("exchange")
            arrived = arrive()
            self._stopwatch.tick("exchange")
            return arrived

        return timed


def watch(bank: ExpertBank, stopwatch: Stopwatch) -> None:
    """Time a bank's forward and backward pass, exchange included."""

    def tick(*_: object) -> None:
        stopwatch.tick("bank")

    def after(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        tick()
        if outputs[0].grad_fn is not None:
            outputs[0].grad_fn.register_prehook(tick)
            outputs[0].grad_fn.register_hook(tick)

    bank.register_forward_pre_hook(tick)
    bank.register_forward_hook(after)


def _between(begin: Any, end: Any) -> float:
    """Milliseconds between two marks."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end)
