"""What a person sees while a command works: stages, one progress bar at a time, tables.

Results go to standard output, progress to standard error. Where there is no terminal (a log
file, a followed job) the bar becomes a line every few seconds.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0


class Meter(Protocol):
    """A task in progress."""

    def update(self, done: float, total: float, note: str = "") -> None:
        """Say how much is done, and something to read beside it."""
        ...


class Terminal:
    """The standard output and error of one command."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._progress = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """One line about what now exists."""
        self._out.print(text, markup=False)

    def stage(self, number: int, of: int, name: str, what: str) -> None:
        """Announce the next stage of a longer command."""
        self._out.print(f"[bold]{number}/{of} {name}[/bold]  {what}")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, numbers to the right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in header:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        self._out.print(table)

    @contextmanager
    def meter(self, what: str, unit: str = "") -> Iterator[Meter]:
        """Show one task's progress within the block."""
        if not self._progress.is_terminal:
            yield _Lines(self._progress, what, unit)
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn() if unit else TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self._progress,
            transient=True,
        ) as progress:
            yield _Bar(progress, what)


class _Bar:
    def __init__(self, progress: Progress, what: str) -> None:
        self._bar = progress
        self._task = progress.add_task(what, total=None, note="")

    def update(self, done: float, total: float, note: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, note=note)


class _Lines:
    """A bar for log files: a line now and then, and one at the end."""

    def __init__(self, console: Console, what: str, unit: str) -> None:
        self._console, self._what, self._unit = console, what, unit
        self._next = 0.0

    def update(self, done: float, total: float, note: str = "") -> None:
        if time.monotonic() < self._next and done < total:
            return
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        share = f"{done:g}/{total:g} {self._unit}" if self._unit else f"{done / (total or 1):.0%}"
        line = f"{self._what} {share} {note}"
        self._console.print(line.rstrip(), markup=False, soft_wrap=True)
