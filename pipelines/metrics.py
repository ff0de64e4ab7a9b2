"""The run's own record of its metrics: one line of JSON per row, appended as they come.

This file is what a run knows of itself, whatever becomes of a tracking server: the
report is drawn from it, and MLflow is fed from it (`tracking`). After a restart the rows
above the step that training goes on from are cut away, so that every step stands once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.files import write_atomically
from pipelines.load import LoadTable, append_load, rewind_load

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """What was measured after `step` optimizer steps: metric names to numbers.

    Training rows hold `loss` (mean in nats over the steps since the row before),
    `learning_rate`, `grad_norm`, `images_per_second`, `alpha`; evaluation rows hold
    `val_accuracy/ec_0.50` and `val_loss/ec_0.50`, one pair per budget. Where bad samples may be
    skipped, `data/skipped` counts them since the run began and `data/val_skipped` in an evaluation;
    `pipelines.skipped` names them. Models with sparse experts
    have `moe/...` too (`mone_core.load.summary`), and `moe/all_to_all_bytes`: what this run's
    first rank hands to exchanges in a step.

    Attributes:
        load: How full the experts were, of training rows of such models; kept in a file of its
            own, see `pipelines.load`.
    """

    step: int
    values: dict[str, float]
    load: LoadTable | None = field(default=None, compare=False)


def append_row(folder: Path, row: MetricRow) -> None:
    """Add one row, and its load; a reader never sees half of an earlier one."""
    if row.load is not None:
        append_load(folder, row.load)
    line = json.dumps({"step": row.step, **row.values}) + "\n"
    with (folder / METRICS).open("a") as file:
        file.write(line)


def read_rows(folder: Path) -> list[MetricRow]:
    """All rows so far; a last line cut off by a kill is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is unfinished
    return [_row(json.loads(line)) for line in lines]


def rewind(folder: Path, step: int) -> None:
    """Drop the rows above `step`: training goes on from there and will write them again."""
    kept: Iterable[MetricRow] = (row for row in read_rows(folder) if row.step <= step)
    text = "".join(json.dumps({"step": row.step, **row.values}) + "\n" for row in kept)
    write_atomically(folder / METRICS, text.encode())
    rewind_load(folder, step)


def _row(fields: dict[str, float]) -> MetricRow:
    step = int(fields.pop("step"))
    return MetricRow(step=step, values=fields)
