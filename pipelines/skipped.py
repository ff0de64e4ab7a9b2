"""The samples that a run went without: `skipped.jsonl` names each once, with the reason.

How many rows went without theirs is in the metrics: `data/skipped` since the run began, and
`data/val_skipped` in each evaluation.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.files import write_atomically
from pipelines.locks import alone
from pipelines.metrics import read_rows

SKIPPED = "skipped.jsonl"
COUNT, VAL_COUNT = "data/skipped", "data/val_skipped"
_LOCK = ".skipped.lock"
_LOCK_SECONDS = 60.0


class SkipList:
    """Adds names to a folder's list; ranks that share the folder take turns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[str] = set()

    def add(self, skipped: Mapping[str, str]) -> None:
        """Name samples, and why each was skipped, unless they are named already."""
        if skipped.keys() <= self._known:
            return
        path = self._folder / SKIPPED
        with alone(self._folder / _LOCK, f"writing to {path}", wait_s=_LOCK_SECONDS):
            named = {**skipped, **read_skipped(self._folder)}
            lines = [json.dumps({"sample": name, "why": why}) for name, why in named.items()]
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        self._known |= named.keys()


def read_skipped(folder: Path) -> dict[str, str]:
    """Why each sample was skipped, by name; empty where none was."""
    path = folder / SKIPPED
    if not path.is_file():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {line["sample"]: line["why"] for line in lines}


def skipped_until(run: Path, step: int) -> int:
    """Training samples that a run skipped up to a step, as its metrics have it."""
    rows = (row.values for row in read_rows(run) if row.step <= step)
    return int(max((values[COUNT] for values in rows if COUNT in values), default=0))
