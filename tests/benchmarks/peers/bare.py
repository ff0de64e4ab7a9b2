"""The bounds: the same crops of the same bytes, in memory, in as many threads, without a loader.

With Pillow this is the 1.00 of the table; with simplejpeg it is the ceiling. `bare_ours` is the
bound of our own stream.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.peers.setup import Batch, Setup, image_files
from tests.benchmarks.peers.transform import Pixels, train_crop

PIECES_PER_THREAD = 4  # of a batch: the slowest images then delay nobody
AHEAD = 2  # batches


def prepare(images: Path, to: Path) -> None:
    """The files as they are."""
    to.symlink_to(images)


class Loader:
    """Batches of the images in order; they are read before the clock starts."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.images = [path.read_bytes() for path in image_files(setup.data)]

    def __iter__(self) -> Generator[Batch, None, None]:
        batch = self.setup.batch
        ahead: deque[tuple[Pixels, range, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self.setup.workers) as pool:
            for start in range(0, len(self.images) - batch + 1, batch):
                ahead.append(self._start(pool, range(start, start + batch)))
                if len(ahead) > AHEAD:
                    yield _finished(*ahead.popleft())
            while ahead:
                yield _finished(*ahead.popleft())

    def state(self) -> Any:
        return None

    def close(self) -> None:
        self.images = []

    def _start(
        self, pool: ThreadPoolExecutor, samples: range
    ) -> tuple[Pixels, range, list[Future[None]]]:
        pixels_BHWC = np.empty((len(samples), self.setup.size, self.setup.size, 3), np.uint8)
        piece = max(1, len(samples) // (self.setup.workers * PIECES_PER_THREAD))
        futures = [
            pool.submit(self._fill, pixels_BHWC[i : i + piece], samples[i : i + piece])
            for i in range(0, len(samples), piece)
        ]
        return pixels_BHWC, samples, futures

    def _fill(self, rows_BHWC: Pixels, samples: range) -> None:
        for row, sample in zip(rows_BHWC, samples, strict=True):
            row[:] = self.crop(sample)

    def crop(self, sample: int) -> Pixels:
        """A sample's pixels."""
        return train_crop(self.images[sample], size=self.setup.size, decoder=self.setup.decoder)


def _finished(pixels_BHWC: Pixels, samples: range, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return torch.from_numpy(pixels_BHWC), torch.arange(samples.start, samples.stop)
