"""What a model needs of the ranks that it runs on, and the case of one process alone.

A model is written as one rank's part of a computation: `share` takes this rank's images out of
something drawn for the whole batch, `to_experts` and `to_tokens` move filled slots between
the ranks that hold the tokens and those that hold the experts, `send_rows` moves rows where there
are no slots. How bytes travel is the business of `cluster.backends`; nothing here or in the layers
knows.

Axes: E experts, Q slots of an expert (one rank's), R expert ranks, d features of one width class.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

# A tensor on its way; the call waits for it.
Arriving = Callable[[], Tensor]


class Ranks(Protocol):
    """The ranks that train one model together.

    Every method must be called by all of them in the same order, and all but `send_rows` with the
    same shapes.

    Attributes:
        expert_ranks: R, those of them that the experts are spread over.
    """

    expert_ranks: int

    @property
    def parts(self) -> int:
        """Equal parts that a batch of images is computed in: on ranks and, there, one by one."""
        ...

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

    def send_rows(
        self, rows: Tensor, sent: Sequence[int], come: Sequence[int], where: str
    ) -> Arriving:
        """Send rows to the R expert ranks, to each a number of its own.

        Args:
            rows: Rows along the first axis, those for one rank next to each other, in the
                order of ranks; contiguous.
            sent: How many go to each rank.
            come: How many come from each; what it gives as `sent` for this one.
            where: Layer, width and pass, for errors.

        Returns:
            To be called for the rows that came, those of one rank next to each other, in the
            order of ranks.
        """
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

    def send_rows(
        self,
        rows: Tensor,
        sent: Sequence[int],  # noqa: ARG002 - all of them
        come: Sequence[int],  # noqa: ARG002
        where: str,  # noqa: ARG002
    ) -> Arriving:
        """They are there."""
        return lambda: rows


ALONE = Alone()
