"""A batch in the making: arrays of its final shape whose places are filled one by one.

Threads (`loader`) and Ray's actors (`ray_reader`) fill places of a job in any order; `stream` says
which samples they are for.

Axes as in `batch`; V views of a sample in a test.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data.batch import Batch
from pipelines.data.order import Position
from pipelines.data.pixels.mixup import mixing_weights
from pipelines.data.pixels.transforms import Pixels
from pipelines.data.rows import Rows, Skipped, Skips
from pipelines.data.settings import AugmentConfig


@dataclass(kw_only=True, slots=True, eq=False)
class TrainJob:
    """A training batch; its places are its rows, but for the repeated ones.

    Attributes:
        maker: Makes the pixels.
        skips: Told of samples that the batch goes without, once it is handed out.
        augment, seed, epoch: What the mixing weights are drawn from.
        samples: The sample of every row.
        repeated: So many rows, the first, are those `period` rows further on once more: the rows
            before the first of a global batch are its last.
        period: Samples of a global batch.
        pixels_RTHWC: To be filled.
        labels_R: Labels of `samples`; changed where another takes a sample's place.
        labels: Labels of the whole dataset.
        mix_BM: To be filled; None: no mixup.
        after: The position after this batch.
        bad: Rows whose sample another took the place of.
    """

    maker: Rows
    skips: Skips
    augment: AugmentConfig
    seed: int
    epoch: int
    samples: list[int]
    repeated: int
    period: int
    pixels_RTHWC: Pixels
    labels_R: NDArray[np.int64]
    labels: NDArray[np.int32]
    mix_BM: NDArray[np.float32] | None
    after: Position
    bad: dict[int, Skipped] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """Rows that differ."""
        return len(self.samples) - self.repeated

    @property
    def _before(self) -> int:
        """Rows at the beginning that are there only for mixing."""
        return 0 if self.mix_BM is None else len(self.samples) - len(self.mix_BM)

    def fill(self, first: int, after: int) -> None:
        """Make some of the rows and their weights."""
        self.maker.damage.read(after - first)
        before = self._before
        for row in range(first + self.repeated, after + self.repeated):
            wanted = self.samples[row]
            pixels, sample, skipped = self.maker.train(wanted, self.epoch)
            self.pixels_RTHWC[row] = pixels
            if skipped is not None:
                self.labels_R[row] = self.labels[sample]
                self.bad[row] = skipped
            if self.mix_BM is not None and row >= before:
                weights = mixing_weights(self.augment, self.seed, self.epoch, wanted)
                self.mix_BM[row - before] = weights

    def finish(self) -> tuple[Batch, Position]:
        """The batch, and the position after it."""
        # The rows before are another rank's samples, or this batch's once more.
        self.skips.add(self.bad[row] for row in sorted(self.bad) if row >= self._before)
        for row in reversed(range(self.repeated)):
            self.pixels_RTHWC[row] = self.pixels_RTHWC[row + self.period]
            self.labels_R[row] = self.labels_R[row + self.period]
        samples = len(self.labels_R) if self.mix_BM is None else len(self.mix_BM)
        batch = Batch(
            pixels_RTHWC=torch.from_numpy(self.pixels_RTHWC),
            labels_R=torch.from_numpy(self.labels_R),
            valid_B=torch.ones(samples, dtype=torch.bool),
            mix_BM=None if self.mix_BM is None else torch.from_numpy(self.mix_BM),
        )
        return batch, self.after


@dataclass(kw_only=True, slots=True, eq=False)
class TestJob:
    """A batch of an evaluation; its places are its samples.

    Attributes:
        maker: Makes the pixels.
        skips: Told of samples that the batch goes without, once it is handed out.
        samples: Samples of the dataset; fewer than the batch has room for at its end.
        pixels_BVTHWC: To be filled.
        labels_B: Labels of `samples`.
        valid_B: False beyond `samples`; set to False where a sample is left out.
        bad: Places whose sample is left out.
    """

    maker: Rows
    skips: Skips
    samples: range
    pixels_BVTHWC: Pixels
    labels_B: NDArray[np.int64]
    valid_B: NDArray[np.bool_]
    bad: dict[int, Skipped] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """Samples."""
        return len(self.samples)

    def fill(self, first: int, after: int) -> None:
        """Make the views of some of the samples."""
        self.maker.damage.read(after - first)
        for place in range(first, after):
            made = self.maker.test(self.samples[place])
            if isinstance(made, Skipped):
                self.valid_B[place] = False
                self.bad[place] = made
            else:
                self.pixels_BVTHWC[place] = made

    def finish(self) -> Batch:
        """The batch, black where there is no sample."""
        self.skips.add(self.bad[place] for place in sorted(self.bad))
        self.pixels_BVTHWC[~self.valid_B] = 0
        self.labels_B[~self.valid_B] = 0
        views = self.pixels_BVTHWC.shape[1]
        return Batch(
            pixels_RTHWC=torch.from_numpy(self.pixels_BVTHWC).flatten(0, 1),
            labels_R=torch.from_numpy(self.labels_B).repeat_interleave(views),
            valid_B=torch.from_numpy(self.valid_B),
        )
