"""Our side: `TrainStream` over our own shards, with threads that decode."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.data.order import Position
from pipelines.data.settings import AugmentConfig, ClipConfig, OrderConfig, ReadConfig, RowConfig
from pipelines.data.stream import TrainStream
from pipelines.storage import Place
from tests.benchmarks.peers.setup import SAMPLES_PER_SHARD, Batch, Setup, image_files
from tests.dataset_folder import write_dataset

SEED = 0


def prepare(images: Path, to: Path) -> None:
    """Shards, index and manifest, a class per sample so that labels tell samples apart."""
    paths = image_files(images)
    samples = {number: (path.read_bytes(), number) for number, path in enumerate(paths)}
    write_dataset(to, samples, num_classes=len(samples), per_shard=SAMPLES_PER_SHARD)


class Loader:
    """One rank's stream, alone in the world."""

    stream = TrainStream

    def __init__(self, setup: Setup) -> None:
        self._stream = self.stream(
            Place(str(setup.data)),
            RowConfig(
                image_size=setup.size,
                frames=1,
                resize=256,
                read=ReadConfig(threads=setup.workers, decoder=setup.decoder),
                augment=AugmentConfig(),
                clip=ClipConfig(),
            ),
            batch_size=setup.batch,
            seed=SEED,
            rank=0,
            world=1,
            order=OrderConfig(),
        )
        self._next = Position(seed=SEED, epoch=0, step=0)
        if setup.state:
            self._next = Position(**setup.state)

    def __iter__(self) -> Generator[Batch, None, None]:
        with closing(self._stream.batches(self._next)) as batches:
            for batch, self._next in batches:
                yield batch.pixels_RTHWC.squeeze(1), batch.labels_R

    def state(self) -> Any:
        where = self._next
        return {"seed": where.seed, "epoch": where.epoch, "step": where.step}

    def close(self) -> None:
        self._stream.close()
