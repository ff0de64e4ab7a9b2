"""Peer: webdataset, tars read from front to back, shuffled by shard and through a buffer."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds

from tests.benchmarks.peers.setup import SAMPLES_PER_SHARD, Batch, Setup, image_files
from tests.benchmarks.peers.transform import Pixels, collate, train_crop

SHUFFLE_BUFFER = 1000  # samples, of the library's own examples


def prepare(images: Path, to: Path) -> None:
    """Tars by the library's own writer."""
    to.mkdir()
    pattern = str(to / "shard-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for number, path in enumerate(image_files(images)):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": number})


class Loader:
    """The library's pipeline and its own DataLoader; it has no state."""

    def __init__(self, setup: Setup) -> None:
        shards = sorted(map(str, setup.data.glob("*.tar")))
        dataset = (
            wds.WebDataset(shards, shardshuffle=len(shards))
            .shuffle(SHUFFLE_BUFFER)
            .to_tuple("jpg", "cls")
            .map(partial(_decoded, setup))
            .batched(setup.batch, collation_fn=collate, partial=False)
        )
        self._loader = wds.WebLoader(dataset, batch_size=None, num_workers=setup.workers)

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from self._loader

    def state(self) -> Any:
        return None

    def close(self) -> None:
        """Workers end with the iterator."""


def _decoded(setup: Setup, sample: tuple[bytes, bytes]) -> tuple[Pixels, int]:
    data, label = sample
    return train_crop(data, size=setup.size, decoder=setup.decoder), int(label)
