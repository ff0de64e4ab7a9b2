"""The contract between training and the machine it runs on."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """What an accelerator must offer to one training process.

    Code above never asks which one it has: a new difference between machines becomes a method
    here. Every method that talks to other ranks must be called by all of them, in the
    same order.

    Attributes:
        rank: This process among the training processes, from 0.
        world: How many there are.
        device: Where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and, with other ranks, average its gradients over them."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The elementwise sum of every rank's tensor, the same bits on every rank."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given (for clocks)."""
        ...
