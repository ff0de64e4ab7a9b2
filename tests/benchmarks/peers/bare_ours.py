"""The bound of our own stream: its crops of the same bytes, in memory, without order or checks."""

from pipelines.data.pixels.random import SampleRandom
from pipelines.data.pixels.transforms import train_image
from pipelines.data.settings import AugmentConfig
from tests.benchmarks.peers import bare
from tests.benchmarks.peers.bare import prepare
from tests.benchmarks.peers.transform import Pixels

__all__ = ["Loader", "prepare"]


class Loader(bare.Loader):
    """Batches of the images in order, as `bare` makes them."""

    def crop(self, sample: int) -> Pixels:
        """A sample's pixels, as `pipelines.data.rows` makes them."""
        return train_image(
            self.images[sample],
            size=self.setup.size,
            augment=AugmentConfig(),
            decoder=self.setup.decoder,
            rng=SampleRandom(sample),
        )
