"""The hand-over from data to training: a batch of fixed shape.

Pixels travel as bytes, a quarter of what floats weigh, and become numbers on the device.
"""

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

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            pixels_BHWC=self.pixels_BHWC.to(device, non_blocking=True),
            labels_B=self.labels_B.to(device, non_blocking=True),
            valid_B=self.valid_B.to(device, non_blocking=True),
        )


def model_input(pixels_BHWC: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], channels first (the range of the JAX ViT families)."""
    return pixels_BHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
