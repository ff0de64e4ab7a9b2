"""Peer: mosaicml-streaming, its own MDS shards, its own order, its own resumption.

The package imports torchvision for its ready-made vision datasets, which are not used here, and
no torchvision from the package index loads beside a torch without CUDA: an empty module stands in.
"""

import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.benchmarks.peers.setup import Batch, Setup, image_files
from tests.benchmarks.peers.transform import Pixels, collate, train_crop

sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))

import streaming  # noqa: E402 - after what stands in

SEED = 0


def prepare(images: Path, to: Path) -> None:
    """MDS shards of the library's own size."""
    columns = {"jpg": "bytes", "label": "int"}
    with streaming.MDSWriter(out=str(to), columns=columns) as writer:
        for number, path in enumerate(image_files(images)):
            writer.write({"jpg": path.read_bytes(), "label": number})


class Images(streaming.StreamingDataset):
    """The library's dataset, with decoding where its documentation puts it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(
            local=str(setup.data), batch_size=setup.batch, shuffle=True, shuffle_seed=SEED
        )
        self._setup = setup

    def __getitem__(self, at: Any) -> tuple[Pixels, int]:
        sample = super().__getitem__(at)
        crop = train_crop(sample["jpg"], size=self._setup.size, decoder=self._setup.decoder)
        return crop, sample["label"]


class Loader:
    """The library's own DataLoader, which counts samples for its state."""

    def __init__(self, setup: Setup) -> None:
        streaming.base.util.clean_stale_shared_memory()
        self._loader = streaming.StreamingDataLoader(
            Images(setup),
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
