"""How every benchmark measures, prints and keeps its numbers; what is measured is elsewhere.

A case is never timed alone: it and its baseline take turns in one process, round after
round, so that whatever else the machine does meets both. A row holds all it takes to run
it again.

On CUDA every case first shows that it never waits for the device, and then becomes one CUDA
graph, so that products are measured and not their launches. Where it cannot be captured it
runs as it is, and its row says so.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mone_core.gemm import gemm
from tests.benchmarks.roofline import ACCELERATORS, Accelerator

Mode = Literal["eager", "graph"]
Run = Callable[[], object]

ROWS = Path(__file__).parent / "rows"
_HERE = Path(__file__).parent
_WARM_UP_ROUNDS = 2

# Settings of the environment that change a processor's times, told with the command.
_TELLING = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One measured case. Every field but the last is needed to run it again; none is optional.

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
        mode: Launched operation by operation ("eager"), or as one CUDA "graph".
        floor_ms: What the accelerator leaves it (`roofline`); None where that is not known.
        commit: Of the code, with "-dirty" where it was changed.
        command: Run it again with this.
        measures: What else a benchmark measured of the case, by its own names.
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
    mode: Mode
    floor_ms: float | None
    commit: str
    command: str
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Time over the baseline's: below 1 is faster; above is slower, and is shown."""
        return self.median_ms / self.baseline_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Something to time against a baseline.

    Attributes:
        case, shape: What it is, as in `BenchRow`; no two cases of a comparison share a shape.
        run: Does it once, always on the same tensors.
        floor_ms: As in `BenchRow`.
    """

    case: str
    shape: str
    run: Run
    floor_ms: float | None = None


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
    def burst(self) -> int:
        """Runs between two looks at the clock: on CUDA enough to hide the launch and the wait."""
        return 1 if self.device == "cpu" else 20

    @property
    def images(self) -> int:
        """Batch size: on an accelerator one that keeps it busy."""
        return 8 if self.device == "cpu" else 128

    @property
    def accelerator(self) -> Accelerator | None:
        """What bounds times from below, where it is known."""
        if self.device == "cpu":
            return None
        return ACCELERATORS.get(torch.cuda.get_device_name())

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
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; use --device cpu")
    torch.set_num_threads(given.threads)
    setting = [f"{name}={os.environ[name]}" for name in _TELLING if name in os.environ]
    command = " ".join([*setting, parser.prog, *arguments])
    return Setting(device=given.device, threads=given.threads, quick=given.quick, command=command)


def compare(
    baseline: Case,
    cases: Sequence[Case],
    setting: Setting,
    clock: Callable[[], float] = time.perf_counter,
) -> list[BenchRow]:
    """Time cases and their baseline in turns; one row per case, the baseline's first."""
    ready = {case.shape: prepare(case, setting.device) for case in (baseline, *cases)}
    times = interleave(
        {shape: run for shape, (run, _) in ready.items()},
        setting.rounds,
        _synchronise(setting.device),
        clock,
        burst=setting.burst,
    )
    name = f"{baseline.case} {baseline.shape}"
    return [
        row_of(case, ready[case.shape][1], times[case.shape], name, times[baseline.shape], setting)
        for case in (baseline, *cases)
    ]


def row_of(
    case: Case,
    mode: Mode,
    times: Sequence[float],
    baseline: str,
    baseline_times: Sequence[float],
    setting: Setting,
) -> BenchRow:
    """The row of a case, from its and its baseline's milliseconds in every round."""
    return BenchRow(
        case=case.case,
        shape=case.shape,
        machine=setting.machine,
        dtype=str(setting.dtype).removeprefix("torch."),
        median_ms=statistics.median(times),
        spread_ms=spread(times),
        repeats=setting.rounds,
        baseline=baseline,
        baseline_ms=statistics.median(baseline_times),
        mode=mode,
        floor_ms=case.floor_ms,
        commit=commit(),
        command=setting.command,
    )


def interleave(
    runs: Mapping[str, Run],
    rounds: int,
    synchronise: Callable[[], None],
    clock: Callable[[], float],
    *,
    burst: int = 1,
) -> dict[str, list[float]]:
    """Milliseconds of every run in every round; each round begins with another one.

    Args:
        burst: Times that a run is repeated in a round; the mean is what counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-_WARM_UP_ROUNDS, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronise()
            start = clock()
            for _ in range(burst):
                runs[name]()
            synchronise()
            if number >= 0:
                times[name].append(1e3 * (clock() - start) / burst)
    return times


def prepare(case: Case, device: str) -> tuple[Run, Mode]:
    """What is timed: the run itself, or on CUDA its graph, after a look for host syncs."""
    if device == "cpu":
        return case.run, "eager"
    warm_up(case)
    return graph_or_run(case, _capture)


def graph_or_run(case: Case, capture: Callable[[Run], Run]) -> tuple[Run, Mode]:
    """The captured run; the run itself, and why on stderr, where it cannot be captured."""
    try:
        return capture(case.run), "graph"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"{case.case} {case.shape} runs eagerly: {reason}", file=sys.stderr)
        return case.run, "eager"


def warm_up(case: Case) -> None:
    """Run a case where graphs want what comes before them: on a stream beside the default one.

    Raises:
        RuntimeError: It makes the host wait for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run()  # kernels are loaded and workspaces made, which may wait
        try:
            with _no_host_sync():
                case.run()
        except RuntimeError as error:
            error.add_note(f"in {case.case} {case.shape}")
            raise
    torch.cuda.current_stream().wait_stream(stream)


def forward(module: nn.Module, x: Tensor) -> Run:
    """A run of the forward pass alone."""

    @torch.inference_mode()
    def run() -> None:
        module(x)

    return run


def forward_backward(module: nn.Module, x: Tensor) -> Run:
    """A run of forward and backward pass, to weights and input, gradients made anew.

    In a CUDA graph they are made once: a replay writes over them, and clears and adds nothing.
    """
    x.requires_grad_()
    seed = torch.randn(x.shape).to(x.device, x.dtype)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(seed)

    return run


def through_onednn(case: Case) -> Case:
    """The same case with the products of `mone_core` by oneDNN; those of torch's layers stay."""

    def run() -> None:
        with gemm("onednn"):
            case.run()

    return replace(case, shape=f"{case.shape} oneDNN", run=run)


def spread(times: Sequence[float]) -> float:
    """90th minus 10th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[-1] - tenths[0]


def table(rows: Sequence[BenchRow]) -> str:
    """Rows as plain text.

    The ratio is to the baseline; "roofline" is what it would be if both ran at their floor.
    """
    head = ("case", "shape", "mode", "median ms", "spread", "baseline ms")
    head = (*head, "ratio", "roofline", "% of floor", "n")
    floors = {f"{row.case} {row.shape}": row.floor_ms for row in rows}
    body = [
        (
            row.case,
            row.shape,
            row.mode,
            f"{row.median_ms:.2f}",
            f"{row.spread_ms:.2f}",
            f"{row.baseline_ms:.2f}",
            f"{row.ratio:.3f}",
            _or_dash(".3f", row.floor_ms, floors.get(row.baseline)),
            _or_dash(".0%", row.floor_ms, row.median_ms),
            str(row.repeats),
        )
        for row in rows
    ]
    return aligned([head, *body], words=3)


def aligned(lines: Sequence[Sequence[str]], *, words: int) -> str:
    """Cells below each other: the first `words` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
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
    measured = (
        ":/mone_core",
        ":/cluster/backends",
        ":/pipelines/data",
        ":/tests/benchmarks/*.py",
    )
    changed = _git("status", "--porcelain", "--", *measured)
    return f"{told}-dirty" if changed else told


def main(
    name: str,
    measure: Callable[[Setting], list[BenchRow]],
    show: Callable[[Sequence[BenchRow]], str] = table,
) -> None:
    """Run one benchmark from its command line: measure, print, append."""
    setting = parse(name, sys.argv[1:])
    rows = measure(setting)
    print(f"{setting.machine}, {rows[0].dtype}, commit {rows[0].commit}")
    print(show(rows))
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


def _capture(run: Run) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def _no_host_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _or_dash(form: str, above: float | None, below: float | None) -> str:
    return "-" if above is None or below is None else format(above / below, form)
