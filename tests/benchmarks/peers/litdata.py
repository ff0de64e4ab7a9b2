"""Peer: litdata, its own chunks, its own order, its own resumption."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import litdata

from tests.benchmarks.peers.setup import Batch, Setup, image_files
from tests.benchmarks.peers.transform import Pixels, collate, train_crop

CHUNK = "64MB"  # of the library's own examples


def prepare(images: Path, to: Path) -> None:
    """Chunks by the library's own writer."""
    numbered = [(str(path), number) for number, path in enumerate(image_files(images))]
    litdata.optimize(
        _stored, numbered, str(to), chunk_bytes=CHUNK, num_workers=1, reorder_files=False
    )


class Loader:
    """The library's own dataset and DataLoader."""

    def __init__(self, setup: Setup) -> None:
        dataset = litdata.StreamingDataset(
            str(setup.data), shuffle=True, drop_last=True, transform=partial(_decoded, setup)
        )
        self._loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=setup.batch,
            num_workers=setup.workers,
            drop_last=True,
            collate_fn=collate,
        )
        if setup.state:
            self._loader.load_state_dict(setup.state)

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from self._loader

    def state(self) -> Any:
        return self._loader.state_dict()

    def close(self) -> None:
        """Workers end with the iterator."""


def _stored(numbered: tuple[str, int]) -> dict[str, Any]:
    path, number = numbered
    return {"jpg": Path(path).read_bytes(), "label": number}


def _decoded(setup: Setup, sample: dict[str, Any]) -> tuple[Pixels, int]:
    return train_crop(sample["jpg"], size=setup.size, decoder=setup.decoder), sample["label"]
