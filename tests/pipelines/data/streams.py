"""Streams over a dataset folder with small settings that tests change one at a time."""

import threading
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipelines.data.batch import Batch
from pipelines.data.order import Position
from pipelines.data.settings import AugmentConfig, ClipConfig, OrderConfig, ReadConfig, RowConfig
from pipelines.data.stream import EvalStream, TrainStream
from pipelines.storage import Place, place

SEED = 3
START = Position(seed=SEED, epoch=0, step=0)
ROWS = RowConfig(
    image_size=16,
    frames=1,
    resize=18,
    read=ReadConfig(),
    augment=AugmentConfig(),
    clip=ClipConfig(),
)


def open_train(folder: Path | Place, **changes: Any) -> TrainStream:
    """A training stream of 16-pixel images, eight a step."""
    settings = {"batch_size": 8, "seed": SEED, "rank": 0, "world": 1}
    settings |= {"order": OrderConfig(window=3)} | changes
    return TrainStream(place(folder), _rows(settings), **settings)


def open_eval(folder: Path | Place, **changes: Any) -> EvalStream:
    """An evaluation stream of 16-pixel images, eight a batch."""
    settings = {"batch_size": 8, "rank": 0, "world": 1} | changes
    return EvalStream(place(folder), _rows(settings), **settings)


def _rows(settings: dict[str, Any]) -> RowConfig:
    """What the settings say of rows; it is taken out of them."""
    names = {field.name for field in fields(RowConfig)} & settings.keys()
    return replace(ROWS, **{name: settings.pop(name) for name in names})


def take(
    folder: Path | Place, count: int, start: Position = START, **changes: Any
) -> list[tuple[Batch, Position]]:
    """The first batches from a position on."""
    batches = open_train(folder, **changes).batches(start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def take_ranks(
    folder: Path | Place, world: int, count: int, start: Position = START, **changes: Any
) -> list[list[tuple[Batch, Position]]]:
    """The same on every rank of a world."""
    return [take(folder, count, start, rank=rank, world=world, **changes) for rank in range(world)]


def joined(parts: list[Batch]) -> Batch:
    """A global batch from the ranks' parts of it, each without what it has only for mixing."""
    own = [part.pixels_RTHWC.shape[0] - part.samples for part in parts]
    mixes = [part.mix_BM for part in parts if part.mix_BM is not None]
    pairs = list(zip(parts, own, strict=True))
    return Batch(
        pixels_RTHWC=torch.cat([part.pixels_RTHWC[first:] for part, first in pairs]),
        labels_R=torch.cat([part.labels_R[first:] for part, first in pairs]),
        valid_B=torch.cat([part.valid_B for part in parts]),
        mix_BM=torch.cat(mixes) if mixes else None,
    )


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    if (left.mix_BM is None) != (right.mix_BM is None):
        return False
    mixed = left.mix_BM is None or torch.equal(left.mix_BM, right.mix_BM)
    return (
        mixed
        and torch.equal(left.pixels_RTHWC, right.pixels_RTHWC)
        and torch.equal(left.labels_R, right.labels_R)
        and torch.equal(left.valid_B, right.valid_B)
    )


def working_threads() -> list[threading.Thread]:
    """Threads that decode or fetch."""
    return [t for t in threading.enumerate() if t.name.startswith(("decode", "fetch"))]
