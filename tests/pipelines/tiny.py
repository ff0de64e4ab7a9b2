"""Runs small enough for a test: coloured squares to learn, a model of some thousand weights.

No Ray and no MLflow in here. `train_here` drives the real loop in this process, `on_ranks`
starts gloo processes on the loopback interface.
"""

import dataclasses
import io
import os
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cluster.backends import Backend, get_backend
from mone_core.models import ModelConfig
from pipelines.build import build_run
from pipelines.checkpoint import checkpoint_of
from pipelines.config import DataConfig, OptimConfig, RunConfig, TrainConfig, write_config
from pipelines.data.motion import encode_webm
from pipelines.data.settings import AugmentConfig, ReadConfig
from pipelines.metrics import MetricRow
from pipelines.run_data import data_of
from pipelines.storage import place
from pipelines.train import Outcome, Run, train
from tests.dataset_folder import write_dataset

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230), (230, 220, 60))
PIXELS = 16


def write_data(root: Path, *, train: int = 32, val: int = 10, classes: int = len(COLOURS)) -> Path:
    """Write `root/train` and `root/val`: sample i is a noisy square of the colour of its class."""
    write_folder(root / "train", range(train), classes=classes)
    write_folder(root / "val", range(1000, 1000 + val), classes=classes)
    return root


def write_folder(folder: Path, samples: Sequence[int], *, classes: int = len(COLOURS)) -> None:
    """Write one finished dataset folder with a single shard; sample i is of class i % classes."""
    write_dataset(folder, squares(samples, classes), num_classes=classes, per_shard=len(samples))


def squares(samples: Sequence[int], classes: int = len(COLOURS)) -> dict[int, tuple[bytes, int]]:
    """The files and labels of such samples."""
    return {i: (_square(i, i % classes), i % classes) for i in samples}


def write_clips(root: Path, *, train: int = 16, val: int = 6) -> Path:
    """Write `root/train` and `root/val` of webm clips: a square of the class's colour moves on."""
    for part, first, count in (("train", 0, train), ("val", 1000, val)):
        clips = {i: (_clip(i, i % 4), i % 4) for i in range(first, first + count)}
        write_dataset(root / part, clips, num_classes=4, per_shard=count, media="webm")
    return root


def _clip(sample: int, label: int) -> bytes:
    noise = np.random.default_rng(sample).integers(0, 60, (10, 20, 20, 3))
    for frame in range(10):
        noise[frame, 4:12, frame : frame + 8] = COLOURS[label]
    return encode_webm(noise.astype(np.uint8))


def _square(sample: int, label: int) -> bytes:
    noise = np.random.default_rng(sample).integers(-30, 31, (PIXELS, PIXELS, 3))
    pixels = np.clip(np.array(COLOURS[label % len(COLOURS)]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tiny_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Twelve steps of eight images at three budgets; `changes` are fields of its `train`."""
    plan = {
        "steps": 12,
        "batch_size": 8,
        "budgets": (0.2, 0.5, 1.0),
        "log_every": 2,
        "eval_every": 6,
        "eval_budgets": (0.2, 1.0),
        "checkpoint_every": 4,
    }
    return RunConfig(
        recipe="digits",
        out=out,
        model=ModelConfig(
            image_size=PIXELS, patch_size=4, num_classes=len(COLOURS), dim=16, depth=2, heads=2
        ),
        data=DataConfig(
            root=str(data),
            eval_resize=PIXELS,
            read=ReadConfig(threads=1),
            augment=AugmentConfig(crop_area=(0.5, 1.0)),
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=3, label_smoothing=0.1),
        train=TrainConfig(**(plan | changes)),
    )


class MemoryReporter:
    """Keeps rows in a list; asks to stop from step `stop_at` on."""

    def __init__(self, stop_at: float = float("inf")) -> None:
        self.rows: list[MetricRow] = []
        self._stop_at = stop_at

    def report(self, row: MetricRow) -> bool:
        """Take the row."""
        self.rows.append(row)
        return row.step >= self._stop_at


class Killed(BaseException):
    """A process that dies in the middle of its work."""


class KilledReporter(MemoryReporter):
    """Dies when it is told of step `stop_at`."""

    def report(self, row: MetricRow) -> bool:
        """Take the row, or die."""
        if super().report(row):
            raise Killed(f"at step {row.step}")
        return False


def build_here(config: RunConfig, reporter: MemoryReporter, backend: Backend | None = None) -> Run:
    """A run as a worker builds it, its folder made as the driver would."""
    backend = backend or get_backend("cpu")
    if backend.rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_config(config.out, config)
    return build_run(config, backend, reporter, data_of(place(config.data.root)))


def train_here(
    config: RunConfig, reporter: MemoryReporter | None = None, backend: Backend | None = None
) -> tuple[Outcome, list[MetricRow]]:
    """Train in this process, going on from the newest checkpoint; gives the rows of this start."""
    reporter = reporter or MemoryReporter()
    return train(build_here(config, reporter, backend)), reporter.rows


def without_clock(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """Rows without the one number that depends on the day."""
    return [
        dataclasses.replace(
            row, values={k: v for k, v in row.values.items() if k != "images_per_second"}
        )
        for row in rows
    ]


def losses(rows: Sequence[MetricRow]) -> list[float]:
    """Training losses in the order of the rows."""
    return [row.values["loss"] for row in rows if "loss" in row.values]


def state_of(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint, weights and moments."""
    return {
        name: value
        for file in sorted(checkpoint_of(run).glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def on_ranks(
    work: Callable[..., None], scratch: Path, *arguments: Any, world: int = 2, expert: int = 1
) -> None:
    """Call `work(backend, *arguments)` in `world` processes that are connected by gloo."""
    meeting = scratch / f"rendezvous-{uuid.uuid4()}"
    mp.spawn(_rank, (world, expert, meeting, work, arguments), nprocs=world)


def _rank(
    rank: int,
    world: int,
    expert: int,
    meeting: Path,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # a rank that left early fails the other one
    )
    try:
        work(get_backend("cpu", expert=expert), *arguments)
    finally:
        dist.destroy_process_group()
