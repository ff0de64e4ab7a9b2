"""How every benchmark measures, prints and keeps its numbers; what is measured is elsewhere.

A case is never timed alone: it and its baseline take turns in one process, round after
round, so that whatever else the machine does meets both. A row holds all it takes to run
it again. Torch and the standard library only.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROWS = Path(__file__).parent / "rows"
_HERE = Path(__file__).parent
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One measured case. Every field is needed to run it again; none is optional.

    Attributes:
        case: The file and the thing under test: "nested/blocks/train".
        shape: Sizes and budget: "S/16 B=8 N=196 e_c=0.3".
        machine: Device, cores, threads and torch.
        dtype: Of the products.
        median_ms: Over `repeats` synchronised runs after warm-up.
        spread_ms: 90th minus 10th percentile.
        repeats: Rounds measured.
        baseline: What the time is compared with.
        baseline_ms: Its median, measured in the same rounds.
        commit: Of the code, with "-dirty" where it was changed.
        command: Run it again with this.
    """

    case: str
    shape: str
    machine: str
    dtype: str
    median_ms: float
    spread_ms: float
    repeats: int
    baseline: str
    baseline_ms: float
    commit: str
    command: str

    @property
    def ratio(self) -> float:
        """Time over the baseline's: below 1 is faster; above is slower, and is shown."""
        return self.median_ms / self.baseline_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Something to time against a baseline: what it is, and one run of each."""

    case: str
    shape: str
    run: Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where a benchmark runs, from its command line."""

    device: str
    threads: int
    quick: bool
    command: str

    @property
    def rounds(self) -> int:
        """Measured rounds: enough for a median that holds, or enough to see that it runs."""
        return 3 if self.quick else 11

    @property
    def dtype(self) -> torch.dtype:
        """What people train in there: bfloat16 on an accelerator, float32 on a processor."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def machine(self) -> str:
        """The machine in words, without its network name."""
        if self.device == "cuda":
            return f"cuda {torch.cuda.get_device_name()}, torch {torch.__version__}"
        cores = f"{os.cpu_count()} cores, {self.threads} used"
        return f"cpu {platform.machine()}, {cores}, torch {torch.__version__}"


def parse(name: str, arguments: Sequence[str]) -> Setting:
    """Read `--device`, `--threads` and `--quick`, and set torch's threads."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.bench_{name}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run?")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    command = " ".join([parser.prog, *arguments])
    return Setting(device=given.device, threads=given.threads, quick=given.quick, command=command)


def compare(
    baseline: Case,
    cases: Sequence[Case],
    setting: Setting,
    clock: Callable[[], float] = time.perf_counter,
) -> list[BenchRow]:
    """Time cases and their baseline in turns; one row per case, the baseline's first."""
    runs = {case.shape: case.run for case in (baseline, *cases)}
    times = interleave(runs, setting.rounds, _synchronise(setting.device), clock)
    baseline_ms = statistics.median(times[baseline.shape])
    return [
        BenchRow(
            case=case.case,
            shape=case.shape,
            machine=setting.machine,
            dtype=str(setting.dtype).removeprefix("torch."),
            median_ms=statistics.median(times[case.shape]),
            spread_ms=spread(times[case.shape]),
            repeats=setting.rounds,
            baseline=f"{baseline.case} {baseline.shape}",
            baseline_ms=baseline_ms,
            commit=commit(),
            command=setting.command,
        )
        for case in (baseline, *cases)
    ]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    synchronise: Callable[[], None],
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Milliseconds of every run in every round; each round begins with another one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-_WARM_UP_ROUNDS, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronise()
            start = clock()
            runs[name]()
            synchronise()
            if number >= 0:
                times[name].append(1e3 * (clock() - start))
    return times


def spread(times: Sequence[float]) -> float:
    """90th minus 10th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[-1] - tenths[0]


def table(rows: Sequence[BenchRow]) -> str:
    """Rows as plain text; the ratio to the baseline stands last but one."""
    head = ("case", "shape", "median ms", "spread", "baseline ms", "ratio", "n")
    body = [
        (
            row.case,
            row.shape,
            f"{row.median_ms:.2f}",
            f"{row.spread_ms:.2f}",
            f"{row.baseline_ms:.2f}",
            f"{row.ratio:.3f}",
            str(row.repeats),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    )


def append_rows(path: Path, rows: Sequence[BenchRow]) -> None:
    """Add rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[BenchRow]:
    """All rows of a file of JSON lines."""
    return [BenchRow(**json.loads(line)) for line in path.read_text().splitlines()]


def commit() -> str:
    """The commit of the code, "-dirty" where it was changed, "unknown" outside a checkout.

    Measured rows are data, not code: a new row alone makes nothing dirty.
    """
    told = _git("rev-parse", "--short=12", "HEAD")
    if told is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ":/mone_core", ":/tests/benchmarks/*.py")
    return f"{told}-dirty" if changed else told


def main(name: str, measure: Callable[[Setting], list[BenchRow]]) -> None:
    """Run one benchmark from its command line: measure, print, append."""
    setting = parse(name, sys.argv[1:])
    rows = measure(setting)
    print(f"{setting.machine}, {rows[0].dtype}, commit {rows[0].commit}")
    print(table(rows))
    append_rows(ROWS / f"{name}.jsonl", rows)


def _git(*arguments: str) -> str | None:
    try:
        told = subprocess.run(
            ["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def _synchronise(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None
