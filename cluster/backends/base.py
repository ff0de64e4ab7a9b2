"""The contract between training and the machines it runs on."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cluster.topology import Mesh


class Placed(Protocol):
    """A model where it computes, and the sum of its gradients over ranks.

    A rank's loss is the sum over its images divided by the images of *all* ranks. Gradients are
    then sums and nothing else: dense ones over all ranks, those of an expert over the ranks
    that hold it. No divisor stands anywhere that could be the wrong one.
    """

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass."""
        ...

    def zero_gradients(self) -> None:
        """Begin a step: no parameter has a gradient."""
        ...

    def last_backward(self) -> None:
        """The next backward pass is the step's last: what it finishes may be summed at once."""
        ...

    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over ranks."""
        ...


class Backend(Protocol):
    """What an accelerator must offer to one training process.

    Code above never asks which one it has: a new difference between machines becomes a method
    here. Every method that talks to other ranks must be called by all of them, in the
    same order. To a model it is its ranks: `parts` to `send_rows` are what `mone_core.ranks`
    asks for, described there.

    Attributes:
        rank: This process among the training processes, from 0.
        world: How many there are.
        host_ranks: How many of them share this machine, this one included.
        mesh: The table they form.
        device: Where this process computes.
        expert_ranks: Ranks that experts are spread over.
        fused_updates: Whether torch's fused optimizers run on the device.
    """

    rank: int
    world: int
    host_ranks: int
    mesh: Mesh
    device: torch.device
    expert_ranks: int
    fused_updates: bool

    @property
    def parts(self) -> int:
        """Equal parts of a batch: the ranks, times those that each computes one by one."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes handed to all-to-alls by this rank so far, what stays with it included."""
        ...

    def place(
        self, model: nn.Module, experts: Collection[str], blocks: Collection[nn.Module] = ()
    ) -> Placed:
        """Move a model to the device, with the same weights on all ranks that hold them.

        Args:
            model: This rank's part of it.
            experts: Names of the parameters that are stacked by expert.
            blocks: Parts of the model that compute one after another. If there are any, all
                ranks split the dense weights among them, and gather a block's while it computes.
        """
        ...

    def put(self, images: Tensor) -> Tensor:
        """Something with this rank's images along its first axis, on the device."""
        ...

    def seed(self, seed: int) -> None:
        """Begin the sequence of random numbers that models draw on the device."""
        ...

    def submit(self) -> None:
        """A step ends: a device that writes operations down first may start on them."""
        ...

    def take_part(self, index: int, of: int) -> None:
        """The next passes compute one of several equal parts of this rank's images."""
        ...

    def share(self, whole: Tensor, axis: int) -> Tensor:
        """This part of something drawn alike for the images of all parts."""
        ...

    def held(self, num_experts: int) -> range:
        """The experts whose weights this process holds."""
        ...

    def to_experts(self, x_EQd: Tensor, where: str) -> Callable[[], Tensor]:
        """Send slots to the ranks of their experts."""
        ...

    def to_tokens(self, y_EQd: Tensor, where: str) -> Callable[[], Tensor]:
        """Send slots back to the ranks of their tokens."""
        ...

    def send_rows(
        self, rows: Tensor, sent: Sequence[int], come: Sequence[int], where: str
    ) -> Callable[[], Tensor]:
        """Send to each rank of the experts a number of rows of its own."""
        ...

    def stacked(self, local: Tensor) -> Tensor:
        """A tensor of this rank's experts as its part of the tensor of all, for checkpoints."""
        ...

    def sum_over_ranks(self, values: Tensor, what: str) -> Tensor:
        """The elementwise sum of every rank's tensor, the same bits on every rank.

        Args:
            what: What is summed, for errors.
        """
        ...

    def sum_over_images(self, values: Tensor, what: str) -> Tensor:
        """The sum over all ranks' images of what was computed from those that this rank sees."""
        ...

    def sum_over_experts(self, values: Tensor, what: str) -> Tensor:
        """The same over the ranks that share out the experts among them."""
        ...

    def barrier(self, what: str) -> None:
        """Wait until every rank is here, patiently: others may be reading or writing files."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given (for clocks)."""
        ...
