"""What a model needs of the ranks that it runs on, and the case of one process alone.

A model is written as one rank's part of a computation: `share` takes this rank's images out of
something drawn for the whole batch, `to_experts` and `to_tokens` move filled slots between
the ranks that hold the tokens and those that hold the experts. How bytes travel is the business of
`cluster.backends`; nothing here or in the layers knows.

Axes: E experts, Q slots of an expert (one rank's), R expert ranks, d features of one width class.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# A tensor on its way; the call waits for it.
Arriving = Callable[[], Tensor]


class Ranks(Protocol):
    """The ranks that train one model together.

    Every method must be called by all of them in the same order, with the same shapes.

    Attributes:
        parts: Equal parts that a batch of images is computed in: on ranks and, there, one by one.
        expert_ranks: R, those of them that the experts are spread over.
    """

    parts: int
    expert_ranks: int

    def share(self, whole: Tensor, axis: int) -> Tensor:
        """This part of what was drawn alike on all ranks, cut along the images' axis."""
        ...

    def held(self, num_experts: int) -> range:
        """The experts whose weights this process holds."""
        ...

    def to_experts(self, x_EQd: Tensor, where: str) -> Arriving:
        """Send slots to the ranks of their experts.

        Args:
            x_EQd: This rank's slots of every expert; contiguous.
            where: Layer, width and pass, for errors.

        Returns:
            To be called for `[E / R, R * Q, d]`: the slots of this rank's experts, those of one
            sending rank next to each other, in the order of ranks.
        """
        ...

    def to_tokens(self, y_EQd: Tensor, where: str) -> Arriving:
        """The way back: `[E / R, R * Q, d]` -> `[E, Q, d]`."""
        ...


class Alone:
    """One process: every image and every expert is here, nothing travels."""

    parts = 1
    expert_ranks = 1

    def share(self, whole: Tensor, axis: int) -> Tensor:  # noqa: ARG002 - the whole axis is here
        """All of it."""
        return whole

    def held(self, num_experts: int) -> range:
        """All."""
        return range(num_experts)

    def to_experts(self, x_EQd: Tensor, where: str) -> Arriving:  # noqa: ARG002
        """They are there."""
        return lambda: x_EQd

    def to_tokens(self, y_EQd: Tensor, where: str) -> Arriving:  # noqa: ARG002
        """They are there."""
        return lambda: y_EQd


ALONE = Alone()
