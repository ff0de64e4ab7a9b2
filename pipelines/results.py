"""What an evaluation found: `results.json`, one entry per compute budget, and where it ran."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict

from pipelines.errors import RunError
from pipelines.files import read_json, write_json

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One compute budget of one set of weights.

    Attributes:
        effective_capacity: The budget asked for, mean width per token over the full width.
        realised_effective_capacity: What whole tokens per image came to.
        accuracy: Share of samples whose largest logit is the label, 0 to 1.
        loss: Mean cross entropy in nats.
        samples: How many samples were evaluated.
        macs: Multiply-accumulates of one forward pass of one image.
        latency_ms: Median milliseconds of one forward pass of `latency_batch` images.
        images_per_second: `latency_batch` over that latency.
    """

    effective_capacity: float
    realised_effective_capacity: float
    accuracy: float
    loss: float
    samples: int
    macs: int
    latency_ms: float
    latency_batch: int
    images_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """An evaluation of one checkpoint at many budgets, and where it ran.

    Attributes:
        name: What was evaluated, for people ("demo/run", "champion v3").
        step: Training step of the weights.
        num_classes: Classes of the data; chance is one over this.
        machine, torch, commit: Where the numbers come from; `commit` is "unknown" outside a
            checkout.
        skipped: Samples that were left out, since they could not be decoded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    step: int
    num_classes: int
    settings: tuple[Setting, ...]
    machine: str
    torch: str
    commit: str
    skipped: int = 0


def read_results(folder: Path) -> Results:
    """Read the results that lie beside a run or an evaluation."""
    return read_json(
        folder / RESULTS,
        Results,
        otherwise=lambda why: RunError(f"{why}; make it with `mone evaluate {folder}`"),
    )


def write_results(folder: Path, results: Results) -> None:
    """Write results.json into a folder, whole or not at all."""
    write_json(folder / RESULTS, results)


def machine_name() -> str:
    """The machine in words, without its network name: "x86_64, 2 cores, cpu"."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}"


def commit_name() -> str:
    """The commit of the source tree that runs, `-dirty` appended where it was changed."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
