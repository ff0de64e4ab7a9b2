"""Peer: torch's DataLoader over loose image files, the way of most training scripts."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.peers.setup import Batch, Setup, image_files
from tests.benchmarks.peers.transform import Pixels, collate, train_crop


def prepare(images: Path, to: Path) -> None:
    """The files as they are."""
    to.symlink_to(images)


class Images(Dataset[tuple[Pixels, int]]):
    """Files by number."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._paths = setup, image_files(setup.data)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Pixels, int]:
        data = self._paths[number].read_bytes()
        return train_crop(data, size=self._setup.size, decoder=self._setup.decoder), number


class Loader:
    """Shuffled, workers of its own; it has no state."""

    def __init__(self, setup: Setup) -> None:
        self._loader = DataLoader(
            Images(setup),
            setup.batch,
            shuffle=True,
            num_workers=setup.workers,
            drop_last=True,
            collate_fn=collate,
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from self._loader

    def state(self) -> Any:
        return None

    def close(self) -> None:
        """Workers end with the iterator."""
