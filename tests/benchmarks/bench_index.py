"""How long a dataset of ImageNet-21K's size takes to open, and how much memory that holds.

The index is real, written shard by shard; the shards themselves are holes of the right size. Every
round opens the folder in a process of its own, goes to a random place of an epoch, and asks for a
global batch there. The baseline reads the whole index as a table, which is what a reader without
columns of its own would keep. Needs the whole project, unlike its neighbours.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.data.manifest import (
    INDEX_SCHEMA,
    Manifest,
    ShardRecord,
    write_index,
    write_manifest,
)
from pipelines.storage import Place
from tests.benchmarks.harness import BenchRow, Case, Setting, main, row_of

SHARDS, PER_SHARD = 3500, 4000
QUICK_SHARDS = 70
MEDIA, STRIDE = 110_000, 112_640  # bytes of an image, and from one to the next
CLASSES = 21_841
BATCH = 4096
HERE = Path(__file__).resolve().parents[2]

# What a process does that is measured; the imports come before the clock starts.
OPEN = """
import json, sys, time
from pathlib import Path
from pipelines.data.manifest import read_index
from pipelines.data.order import SampleOrder
from pipelines.data.reader import SampleReader
from pipelines.data.settings import ReadConfig
from pipelines.storage import Place


def peak_mib():  # of this process alone: getrusage tells that of the one before exec, too
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

folder, what, batch, seed = Place(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
told = {"imports_mib": peak_mib()}
start = time.perf_counter()
if what == "table":
    table = read_index(folder)
else:
    reader = SampleReader(folder, ReadConfig())
opened = time.perf_counter()
told["open_ms"] = 1e3 * (opened - start)
if what == "reader":
    order = SampleOrder(
        shard_samples=reader.shard_samples, batch_size=batch, lanes=256, window=4096, seed=seed
    )
    order.rows(seed, seed * 977 % order.steps_per_epoch, 0, batch)
    told["first_rows_ms"] = 1e3 * (time.perf_counter() - opened)
told["peak_mib"] = peak_mib()
print(json.dumps(told))
"""


def measure(setting: Setting) -> list[BenchRow]:
    """Open the same folder both ways in turns; one row each."""
    shards = QUICK_SHARDS if setting.quick else SHARDS
    told: dict[str, list[dict[str, float]]] = {"table": [], "reader": []}
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), shards)
        for number in range(setting.rounds):
            for what in sorted(told, reverse=number % 2 == 0):
                told[what].append(_opened(scratch, what, number))
    times = {what: [each["open_ms"] for each in every] for what, every in told.items()}
    shape = f"samples={shards * PER_SHARD} shards={shards}"
    rows = []
    for what, case in (("table", "index/table"), ("reader", "index/open")):
        empty = Case(case=case, shape=shape, run=lambda: None)
        baseline = f"index/table {shape}"
        row = row_of(empty, "eager", times[what], baseline, times["table"], setting)
        rows.append(replace(row, dtype="-", measures=_medians(told[what])))
    return rows


def show(rows: Sequence[BenchRow]) -> str:
    """Rows as text: seconds to open, memory, and milliseconds to the first rows."""
    lines = []
    for row in rows:
        measures = ", ".join(f"{name} {value:.1f}" for name, value in row.measures.items())
        lines.append(f"{row.case} {row.shape}: x{row.ratio:.2f} of the table; {measures}")
    return "\n".join(lines)


def write_folder(folder: Path, shards: int) -> None:
    """A dataset folder whose index is whole and whose shards are holes."""
    size = PER_SHARD * STRIDE
    records = []
    for shard in range(shards):
        name = f"shard-{shard:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(size)
        records.append(ShardRecord(name=name, samples=PER_SHARD, bytes=size, sha256="", version=1))
    manifest = Manifest(
        version=1,
        classes=tuple(f"n{k:08d}" for k in range(CLASSES)),
        sources=(),
        seed=0,
        samples=shards * PER_SHARD,
        bytes=shards * size,
        shards=tuple(records),
        skipped=(),
        index_sha256=write_index(Place(str(folder)), _tables(shards)),
    )
    write_manifest(Place(str(folder)), manifest)


def _tables(shards: int) -> Iterator[pa.Table]:
    """Rows of one shard after the other, as random as real ones."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        labels = rng.integers(0, CLASSES, PER_SHARD)
        numbers = rng.integers(0, 100_000, PER_SHARD)
        sizes = rng.integers(MEDIA // 4, MEDIA, PER_SHARD)
        starts = 512 + np.arange(PER_SHARD) * STRIDE
        keys = [f"n{k:08d}_{i}" for k, i in zip(labels.tolist(), numbers.tolist(), strict=True)]
        columns = {
            "key": keys,
            "shard": np.full(PER_SHARD, shard),
            "label": labels,
            "media": ["jpg"] * PER_SHARD,
            "media_offset": starts,
            "media_size": sizes,
            "crc32": rng.integers(0, 1 << 32, PER_SHARD),
            "cls_offset": starts + sizes,
            "cls_size": np.full(PER_SHARD, 5),
            "json_offset": starts + sizes + 1024,
            "json_size": rng.integers(60, 90, PER_SHARD),
            "remark": [None] * PER_SHARD,
        }
        yield pa.table(
            {field.name: pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA},
            schema=INDEX_SCHEMA,
        )


def _opened(folder: str, what: str, seed: int) -> dict[str, float]:
    command = [sys.executable, "-c", OPEN, folder, what, str(BATCH), str(seed)]
    said = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(said.stdout)
    return told


def _medians(told: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([each[name] for each in told])) for name in told[0]}


if __name__ == "__main__":
    main("index", measure, show)
