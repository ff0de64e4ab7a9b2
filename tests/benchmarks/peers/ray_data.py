"""Peer: Ray Data, which reads tars and decodes in tasks; batches come through its object store."""

from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import ray.data

from tests.benchmarks.peers.mone_ray import machinery
from tests.benchmarks.peers.setup import Batch, Setup
from tests.benchmarks.peers.transform import train_crop
from tests.benchmarks.peers.webdataset import prepare

__all__ = ["Loader", "machinery", "prepare"]


class Loader:
    """One execution over all shards; it has no state."""

    def __init__(self, setup: Setup) -> None:
        shards = sorted(map(str, setup.data.glob("*.tar")))
        self._batch = setup.batch
        dataset = ray.data.read_webdataset(shards, decoder=None, shuffle="files")
        self._dataset = dataset.map_batches(partial(_decoded, setup), batch_size=setup.batch)

    def __iter__(self) -> Generator[Batch, None, None]:
        batches = self._dataset.iter_torch_batches(
            batch_size=self._batch, drop_last=True, prefetch_batches=2
        )
        with closing(iter(batches)) as each:
            for batch in each:
                yield batch["pixels"], batch["label"]

    def state(self) -> Any:
        return None

    def close(self) -> None:
        """The execution ends with the iterator."""


def _decoded(setup: Setup, samples: dict[str, Any]) -> dict[str, Any]:
    crops = [train_crop(data, size=setup.size, decoder=setup.decoder) for data in samples["jpg"]]
    return {"pixels": np.stack(crops), "label": np.array([int(n) for n in samples["cls"]])}
