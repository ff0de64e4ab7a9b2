"""Who stands where when experts are spread over ranks: arithmetic, no torch, no network.

Ranks form a table of `data` rows and `expert` columns, numbered along the rows. A row shares
out the experts and exchanges tokens; rows are what lies closest together (one host, one NVLink
or ICI domain), since every layer exchanges. A column holds the same experts and adds up their
gradients. Everything that is not an expert is replicated over the whole table, and every rank
computes images of its own.
"""

from dataclasses import dataclass

from cluster.errors import LaunchError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A table of ranks.

    Attributes:
        data: Rows: copies of every expert.
        expert: Columns: ranks that the experts are spread over.
    """

    data: int
    expert: int

    @classmethod
    def of(cls, world: int, expert: int) -> "Mesh":
        """The table of `world` ranks with so many columns.

        Raises:
            LaunchError: The columns do not divide the ranks.
        """
        if expert < 1 or world % expert:
            fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise LaunchError(
                f"experts cannot be spread over {expert} of {world} ranks; set parallel.expert to "
                f"one of {fitting}, or parallel.num_workers to a multiple of {max(expert, 1)}"
            )
        return cls(data=world // expert, expert=expert)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.data * self.expert

    def place(self, rank: int) -> tuple[int, int]:
        """Row and column of a rank."""
        return divmod(rank, self.expert)

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks that `rank` exchanges tokens with, itself included."""
        first = rank - rank % self.expert
        return tuple(range(first, first + self.expert))

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts as `rank`, itself included."""
        return tuple(range(rank % self.expert, self.world, self.expert))

    def experts(self, rank: int, num_experts: int) -> range:
        """The experts that a rank holds.

        Raises:
            LaunchError: The columns do not share out the experts evenly.
        """
        if num_experts % self.expert:
            fitting = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise LaunchError(
                f"{num_experts} experts cannot be spread evenly over {self.expert} ranks; set "
                f"parallel.expert to one of {fitting}"
            )
        each = num_experts // self.expert
        first = self.place(rank)[1] * each
        return range(first, first + each)


def meshes(world: int, num_experts: int) -> tuple[Mesh, ...]:
    """Every table of `world` ranks whose columns share out the experts evenly, fewest columns
    first."""
    return tuple(
        Mesh(world // expert, expert)
        for expert in range(1, min(world, num_experts) + 1)
        if world % expert == 0 and num_experts % expert == 0
    )
