"""The hand-over from data to training: a batch of fixed shape.

Pixels travel as bytes, a quarter of what floats weigh, and become numbers on the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images and labels of one step, always the same shape.

    Axes: B images of this rank, H height, W width, C red-green-blue.

    Attributes:
        pixels_BHWC: uint8.
        labels_B: int64, position in the manifest's class list.
        valid_B: bool; False marks a row that only fills up the last batch of an evaluation.
    """

    pixels_BHWC: Tensor
    labels_B: Tensor
    valid_B: Tensor

    def moved(self, put: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch where `put` (a backend's) puts its tensors."""
        return Batch(
            pixels_BHWC=put(self.pixels_BHWC),
            labels_B=put(self.labels_B),
            valid_B=put(self.valid_B),
        )

    def parts(self, count: int) -> "Iterator[Batch]":
        """The same images in so many equal parts, in order; `count` divides them."""
        size = self.labels_B.shape[0] // count
        for start in range(0, count * size, size):
            rows = slice(start, start + size)
            yield Batch(
                pixels_BHWC=self.pixels_BHWC[rows],
                labels_B=self.labels_B[rows],
                valid_B=self.valid_B[rows],
            )


def model_input(pixels_BHWC: Tensor) -> Tensor:
    """uint8 pixels in [-1, 1], channels first (the range of the JAX ViT families).

    In torch's default dtype, as the weights of a new model: float32 unless somebody chose another.
    """
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.get_default_dtype())
    return pixels_BCHW.div_(127.5).sub_(1.0)
