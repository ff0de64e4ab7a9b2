"""The hand-over from data to training: a batch of fixed shape.

Pixels travel as bytes, a quarter of what floats weigh, and become numbers on the device. An image
is a clip of one frame.

Axes: R rows of pixels, B samples of this rank, T frames, H height, W width, C red-green-blue,
M images mixed into one, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images or clips and labels of one step, always the same shape.

    Without mixup R is B. With it, row `B` of the samples is mixed with the M - 1 rows before it in
    the global batch (arXiv 1710.09412; V-MoE rolls its batch likewise), and so the M - 1 rows that
    precede this rank's first come first: R is B + M - 1. In a test of V views a sample, R is B * V,
    the views of a sample next to each other.

    Attributes:
        pixels_RTHWC: uint8.
        labels_R: int64, of every row: position in the manifest's class list; -1: not known.
        valid_B: bool; False marks a sample that only fills up the last batch of an evaluation.
        mix_BM: Mixing weights, the sample's own first; float32, rows sum to 1. None: no mixup.
    """

    pixels_RTHWC: Tensor
    labels_R: Tensor
    valid_B: Tensor
    mix_BM: Tensor | None = None

    @property
    def samples(self) -> int:
        """B."""
        return self.valid_B.shape[0]

    @property
    def views(self) -> int:
        """Rows of pixels per sample in a test of several views; 1 in training."""
        return 1 if self.mix_BM is not None else self.pixels_RTHWC.shape[0] // self.samples

    def moved(self, put: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch where `put` (a backend's) puts its tensors."""
        return Batch(
            pixels_RTHWC=put(self.pixels_RTHWC),
            labels_R=put(self.labels_R),
            valid_B=put(self.valid_B),
            mix_BM=None if self.mix_BM is None else put(self.mix_BM),
        )

    def parts(self, count: int) -> "Iterator[Batch]":
        """The same training samples in so many equal parts, in order; `count` divides them."""
        size = self.samples // count
        extra = self.pixels_RTHWC.shape[0] - self.samples
        for start in range(0, count * size, size):
            rows, samples = slice(start, start + size + extra), slice(start, start + size)
            yield replace(
                self,
                pixels_RTHWC=self.pixels_RTHWC[rows],
                labels_R=self.labels_R[rows],
                valid_B=self.valid_B[samples],
                mix_BM=None if self.mix_BM is None else self.mix_BM[samples],
            )

    def inputs(self) -> Tensor:
        """What the model takes, `[R, 3, H, W]` or clips `[R, T, 3, H, W]`, mixed if it has weights.

        In [-1, 1] (the range of the JAX ViT families) and torch's default dtype, as the weights of
        a new model: float32 unless somebody chose another.
        """
        x = model_input(self.pixels_RTHWC)
        return x if self.mix_BM is None else _mixed(x, self.mix_BM)

    def targets(self, num_classes: int) -> Tensor:
        """Training targets: labels `B`, or shares of classes `[B, K]` of mixed samples."""
        if self.mix_BM is None:
            return self.labels_R
        one_hot_RK = F.one_hot(self.labels_R, num_classes).to(self.mix_BM.dtype)
        return _mixed(one_hot_RK, self.mix_BM)


def model_input(pixels_RTHWC: Tensor) -> Tensor:
    """uint8 pixels in [-1, 1], channels first; without the frames' axis if there is one frame."""
    pixels_RTCHW = pixels_RTHWC.permute(0, 1, 4, 2, 3).to(torch.get_default_dtype())
    x = pixels_RTCHW.div_(127.5).sub_(1.0)
    return x.squeeze(1) if x.shape[1] == 1 else x


def _mixed(rows: Tensor, mix_BM: Tensor) -> Tensor:
    """Weighted sums of each sample's row and those before it."""
    samples, images = mix_BM.shape
    weights_BM = mix_BM.to(rows.dtype).view(samples, images, *(1,) * (rows.dim() - 1))
    first = images - 1
    out = rows[first:] * weights_BM[:, 0]
    for back in range(1, images):
        out += rows[first - back : first - back + samples] * weights_BM[:, back]
    return out
