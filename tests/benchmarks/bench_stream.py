"""Training batches a second: our stream, bare loops, and the loaders that people use instead.

    python -m tests.benchmarks.bench_stream --threads 2

All read the same JPEGs on the same machine, crop to 224 and hand over batches of 64 in bytes, in
as many workers (threads or processes) as others have. Each runs with both decoders: with Pillow,
as its users write it, and with simplejpeg and torch, which tells loaders apart from decoders. The
reference is a bare Pillow loop over bytes in memory; the ceiling is the same with simplejpeg. Our
own crops leave rows undecoded, so that our stream has a bound of its own, `bare_ours`. What the
sides are is said in their files below `peers/`.

Every side runs in fresh processes (`peers.side`), in turns, round after round: a loader that only
waits for its turn would decode ahead meanwhile. Peers that are not installed are left out, and
named; `make bench` installs them. Memory and resumption are looked at in runs of their own.
Memory is that of all processes of a side, pages that several share counted once.
"""

import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import BenchRow, Setting, aligned, commit, main, spread

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "tests.benchmarks.peers.images"
SIDE = "tests.benchmarks.peers.side"
BATCH, SIZE = 64, 224
# Packages that a side imports beyond what every side does.
NEEDS = {
    "bare": "simplejpeg",
    "bare_ours": "simplejpeg",
    "mone": "pyarrow",
    "mone_ray": "ray",
    "files": "simplejpeg",
    "webdataset": "webdataset",
    "streaming": "streaming",
    "litdata": "litdata",
    "ray_data": "ray",
}
DECODERS = ("pillow", "simplejpeg")
LOOK_S = 0.05  # between two looks at a side's memory
SIDE_S = 300  # a side that takes longer has failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A loader with one of the two decoders."""

    name: str
    decoder: str

    def __str__(self) -> str:
        return f"{self.name} {self.decoder}"


REFERENCE = Side(name="bare", decoder="pillow")
CEILING = Side(name="bare", decoder="simplejpeg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is read."""

    samples: int
    skip: int
    batches: int
    rounds: int

    @classmethod
    def of(cls, setting: Setting) -> "Scale":
        """Enough to hold, or enough to see that it runs."""
        if setting.quick:
            return cls(samples=10 * BATCH, skip=2, batches=4, rounds=2)
        return cls(samples=48 * BATCH, skip=8, batches=32, rounds=7)


class Bench:
    """The sides on one set of images.

    Attributes:
        sides: Those that are installed, the reference and the ceiling first.
        images: What the images are.
    """

    def __init__(
        self, folder: Path, setting: Setting, scale: Scale, names: Sequence[str] = tuple(NEEDS)
    ) -> None:
        """Write the images into a folder, in the format of every side that is installed."""
        self._folder, self._setting, self._scale = folder, setting, scale
        self.images = _run("-m", IMAGES, str(folder / "images"), str(scale.samples)).strip()
        for name in [name for name in names if not is_installed(name)]:
            print(f"left out: {name} needs {NEEDS[name]}, which is not installed", file=sys.stderr)
        names = [name for name in names if is_installed(name)]
        self.sides = [Side(name=name, decoder=each) for name in names for each in DECODERS]
        for name in names:
            self._ask(name, "prepare", images=str(folder / "images"), to=str(folder / name))

    def rates(self) -> dict[Side, list[dict[str, float]]]:
        """What every side streams in every round; each round begins with another one."""
        told: dict[Side, list[dict[str, float]]] = {side: [] for side in self.sides}
        for number in range(self._scale.rounds):
            first = number * 3 % len(self.sides)
            for side in self.sides[first:] + self.sides[:first]:
                told[side].append(self.rate(side))
            print(f"round {number + 1} of {self._scale.rounds}", file=sys.stderr)
        return told

    def rate(self, side: Side) -> dict[str, float]:
        """Images a second in a fresh process, and seconds to the first batch."""
        arguments = self._arguments(side, skip=self._scale.skip, batches=self._scale.batches)
        return self._ask(side.name, "stream", **arguments)

    def peak_mib(self, side: Side) -> float:
        """Memory of all of a side's processes at its height, MiB."""
        arguments = self._arguments(side, skip=self._scale.skip, batches=self._scale.batches)
        command = [sys.executable, "-m", SIDE, side.name, "stream", json.dumps(arguments)]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(map(_resident_bytes, _tree(process.pid))))
                time.sleep(LOOK_S)
        return peak / 2**20

    def resume_s(self, side: Side) -> float | None:
        """Seconds from a state in the middle of the epoch to the batch that follows.

        None: it has no state, or another batch follows than would have without the stop.
        """
        half = self._scale.samples // BATCH // 2
        told = self._ask(side.name, "stop", **self._arguments(side, batches=half))
        if told["state"] is None:
            return None
        again = self._ask(side.name, "resume", **self._arguments(side, state=told["state"]))
        return again["first_s"] if again["labels"] == told["labels"] else None

    def _arguments(self, side: Side, *, state: Any = None, **more: Any) -> dict[str, Any]:
        setup = {
            "data": str(self._folder / side.name),
            "decoder": side.decoder,
            "workers": self._setting.threads,
            "batch": BATCH,
            "size": SIZE,
            "state": state,
        }
        return {"setup": setup, **more}

    def _ask(self, name: str, task: str, **arguments: Any) -> Any:
        printed = _run("-m", SIDE, name, task, json.dumps(arguments))
        return json.loads(printed.splitlines()[-1])


def is_installed(name: str) -> bool:
    """Whether a side could run here."""
    return importlib.util.find_spec(NEEDS[name]) is not None


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, the bare loops' first."""
    scale = Scale.of(setting)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), setting, scale)
        told = bench.rates()
        return [row_of(side, told, bench, setting) for side in bench.sides]


def row_of(
    side: Side, told: Mapping[Side, Sequence[Mapping[str, float]]], bench: Bench, setting: Setting
) -> BenchRow:
    """A side's row; ratios are medians over the rounds, of rates in the same round."""
    rates = {each: [round_["images_per_s"] for round_ in told[each]] for each in told}
    batch_ms = [1e3 * BATCH / rate for rate in rates[side]]
    measures = {
        "images_per_s": statistics.median(rates[side]),
        "first_batch_s": statistics.median(round_["first_s"] for round_ in told[side]),
        "peak_mib": bench.peak_mib(side),
        **_shares("of_pillow", rates[side], rates[REFERENCE]),
        **_shares("of_ceiling", rates[side], rates[CEILING]),
    }
    if (seconds := bench.resume_s(side)) is not None:
        measures["resume_s"] = seconds
    return BenchRow(
        case=f"stream/{side.name}",
        shape=f"{side.decoder} {SIZE}px B={BATCH} workers={setting.threads}, {bench.images}",
        machine=setting.machine,
        dtype="uint8",
        median_ms=statistics.median(batch_ms),
        spread_ms=spread(batch_ms),
        repeats=len(batch_ms),
        baseline=f"stream/{REFERENCE.name} {REFERENCE.decoder}",
        baseline_ms=statistics.median(1e3 * BATCH / rate for rate in rates[REFERENCE]),
        mode="eager",
        floor_ms=None,
        commit=commit(),
        command=setting.command,
        measures=measures,
    )


def show(rows: Sequence[BenchRow]) -> str:
    """Rows as plain text; above 1 is faster than the bare Pillow loop."""
    head = ("loader", "decoder", "images/s", "of Pillow", "+-", "of ceiling", "+-")
    head = (*head, "first batch s", "resume s", "peak MiB", "n")
    body = [
        (
            row.case.removeprefix("stream/"),
            row.shape.partition(" ")[0],
            f"{(told := row.measures)['images_per_s']:.0f}",
            f"{told['of_pillow']:.2f}",
            f"{told['of_pillow_spread'] / 2:.2f}",
            f"{told['of_ceiling']:.2f}",
            f"{told['of_ceiling_spread'] / 2:.2f}",
            f"{told['first_batch_s']:.2f}",
            f"{told['resume_s']:.2f}" if "resume_s" in told else "cannot",
            f"{told['peak_mib']:.0f}",
            str(row.repeats),
        )
        for row in rows
    ]
    return f"{rows[0].shape.partition(', ')[2]}\n{aligned([head, *body], words=2)}"


def _shares(name: str, rates: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    shares = [rate / other for rate, other in zip(rates, others, strict=True)]
    return {name: statistics.median(shares), f"{name}_spread": spread(shares)}


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=SIDE_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def _tree(root: int) -> Iterator[int]:
    """A process and all below it that live now."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            below = children.read_text().split()
        except OSError:  # it has just ended
            continue
        yield from itertools.chain.from_iterable(_tree(int(child)) for child in below)


def _resident_bytes(process: int) -> int:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    shared = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(shared.split()[1]) << 10


if __name__ == "__main__":
    main("stream", measure, show)
