"""How much of which image a mixed training image holds (mixup, arXiv 1710.09412).

The mixing itself happens on the device, see `pipelines.data.batch.Batch`.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.data.order import mix64, sample_seed
from pipelines.data.pixels.random import SampleRandom
from pipelines.data.settings import AugmentConfig

# Parts these draws from the sample's crop and colours, which use the seed as it is.
_MIXUP = 0x6D69787570


def mixing_weights(
    augment: AugmentConfig, seed: int, epoch: int, sample: int
) -> NDArray[np.float32]:
    """Draw the shares of one mixed image: a symmetric Dirichlet distribution, largest first.

    The largest is the sample's own, as in V-MoE's training; of two images it is the larger share of
    a Beta distribution. Every rank draws the same.

    Args:
        augment: `mixup` is the concentration, above 0; `mixup_images` how many are mixed.
        seed, epoch, sample: As for `order.sample_seed`.

    Returns:
        Shares that sum to 1 up to rounding, descending, shape [mixup_images].
    """
    rng = SampleRandom(mix64(sample_seed(seed, epoch, sample) ^ _MIXUP))
    logs = np.array([rng.log_gamma(augment.mixup) for _ in range(augment.mixup_images)])
    parts = np.exp(logs - logs.max())  # the ratios of tiny numbers, of which none is left as 0 / 0
    shares: NDArray[np.float32] = np.sort(parts / parts.sum())[::-1].astype(np.float32)
    return shares
