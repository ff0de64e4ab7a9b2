"""The run's own record of how full its experts were: one line of JSON per training row.

A line holds the sums of `mone_core.load` over the steps since the line before and over all ranks,
so that lines add up to longer windows and every rate can be made of them. As in `metrics`, after a
restart the lines above the step that training goes on from are cut away, and a line cut off by a
kill is not there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_core.load import FIELDS, dead_experts, drop_rates
from pipelines.errors import RunError
from pipelines.files import write_atomically

LOAD = "load.jsonl"
DROP_ALERT = 0.3  # share of a layer's choices; a fresh router drops more, a trained one less


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadTable:
    """How full the experts were in the steps up to `step`.

    Attributes:
        step: Optimizer steps done.
        layers: The blocks that have experts, counted from 0.
        dims: Features of every width class, narrowest first.
        sums_LWEF: Sums over tokens, `mone_core.load.load_sums`, on the host.
    """

    step: int
    layers: tuple[int, ...]
    dims: tuple[int, ...]
    sums_LWEF: Tensor


def append_load(folder: Path, table: LoadTable) -> None:
    """Add one line; a reader never sees half of an earlier one."""
    line = {
        "step": table.step,
        "layers": table.layers,
        "widths": table.dims,
        "fields": FIELDS,
        "sums": _short(table.sums_LWEF.tolist()),
    }
    with (folder / LOAD).open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def read_loads(folder: Path) -> list[LoadTable]:
    """All tables so far; none where the model has no sparse experts.

    Raises:
        RunError: A line holds other fields than this version sums.
    """
    return [_table(line, folder / LOAD) for line in _lines(folder)]


def rewind_load(folder: Path, step: int) -> None:
    """Drop the lines above `step`, where there are any: training will write them again."""
    if (folder / LOAD).is_file():
        kept = [line for line in _lines(folder) if json.loads(line)["step"] <= step]
        write_atomically(folder / LOAD, "".join(line + "\n" for line in kept).encode())


def window(tables: Sequence[LoadTable]) -> LoadTable:
    """Several tables of one run, in order and at least one, as one over all their steps."""
    last = tables[-1]
    sums_LWEF = torch.stack([table.sums_LWEF for table in tables]).sum(dim=0)
    return LoadTable(step=last.step, layers=last.layers, dims=last.dims, sums_LWEF=sums_LWEF)


def alerts(table: LoadTable, *, drop_rate: float = DROP_ALERT) -> list[str]:
    """What a user should know of a table, one line each; none where all is well.

    Args:
        table: The load of some steps.
        drop_rate: Share of a layer's choices that may be dropped without a word, 0 to 1.
    """
    told = []
    rates = zip(table.layers, drop_rates(table.sums_LWEF).tolist(), strict=True)
    high = [f"{rate:.0%} in block {layer}" for layer, rate in rates if rate > drop_rate]
    if high:
        told.append(
            f"step {table.step}: experts are too full and drop choices, {', '.join(high)} (more "
            f"than {drop_rate:.0%}); raise model.experts.capacity_ratio or "
            f"model.experts.load_weight"
        )
    dead: dict[int, list[str]] = {}
    for at, expert in dead_experts(table.sums_LWEF):
        dead.setdefault(table.layers[at], []).append(str(expert))
    if dead:
        where = "; ".join(f"block {layer}: {', '.join(names)}" for layer, names in dead.items())
        told.append(
            f"step {table.step}: experts that get hardly any token: {where}; raise "
            f"model.experts.importance_weight and model.experts.load_weight"
        )
    return told


def _lines(folder: Path) -> list[str]:
    path = folder / LOAD
    if not path.is_file():
        return []
    return path.read_text().split("\n")[:-1]  # what follows the last newline is unfinished


def _table(line: str, path: Path) -> LoadTable:
    content = json.loads(line)
    if content["fields"] != list(FIELDS):
        raise RunError(
            f"{path} holds the fields {', '.join(content['fields'])}, but this version of mone "
            f"reads {', '.join(FIELDS)}; read it with the version that wrote it"
        )
    return LoadTable(
        step=content["step"],
        layers=tuple(content["layers"]),
        dims=tuple(content["widths"]),
        sums_LWEF=torch.tensor(content["sums"], dtype=torch.float64),
    )


def _short(value: Any) -> Any:
    """Nested lists of numbers for JSON: counts as whole numbers, the rest to nine digits."""
    if isinstance(value, list):
        return [_short(each) for each in value]
    return int(value) if value.is_integer() else float(f"{value:.9g}")
