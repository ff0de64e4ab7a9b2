"""What travels between ranks in a training step, how long it takes, and what of it shows.

Two things travel: tokens to the ranks of their experts and back, along a row of the mesh, and
gradients, summed over the ranks that hold the same weights. Both links of a cluster work at once:
the fast one inside islands, the slow one between them.

Axes: E experts, Q slots of an expert, d features of one width class.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.backends.gradients import BUCKET_BYTES
from cluster.topology import Mesh
from pipelines.planning.clusters import Cluster

GRADIENT_BYTES = 4  # of a parameter: gradients are float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The tokens of one sparse layer on their way there and back, in one pass.

    Attributes:
        num_bytes: What leaves a rank.
        seconds: On the wire.
        exposed_seconds: What the layer takes beyond its products.
    """

    num_bytes: float
    seconds: float
    exposed_seconds: float


def exchange(
    classes: Sequence[tuple[int, int]],
    product_seconds: Sequence[float],
    mesh: Mesh,
    cluster: Cluster,
) -> Exchange:
    """One sparse layer's tokens to their experts and back.

    Where communication overlaps, a width class travels while those before it are computed: all go
    out in turn, and each comes back once it is computed and the wire is free. A single class
    has nothing to hide behind.

    Args:
        classes: Slots of all experts that a rank fills, E * Q, and their width, widest first.
        product_seconds: What a rank computes for each class in between.
    """
    if mesh.expert == 1:
        return Exchange(num_bytes=0.0, seconds=0.0, exposed_seconds=0.0)
    buffers = [slots * dim * cluster.item for slots, dim in classes]
    wire = [_all_to_all_seconds(each, mesh, cluster) for each in buffers]
    if cluster.overlap:
        arrived, computed, returned = 0.0, 0.0, sum(wire)
        for travel, compute in zip(wire, product_seconds, strict=True):
            arrived += travel
            computed = max(arrived, computed) + compute
            returned = max(computed, returned) + travel
        exposed = returned - sum(product_seconds)
    else:
        exposed = 2 * sum(wire)
    leaving = (mesh.expert - 1) / mesh.expert
    return Exchange(
        num_bytes=2 * leaving * sum(buffers), seconds=2 * sum(wire), exposed_seconds=exposed
    )


def reduction(dense: float, experts: float, mesh: Mesh, cluster: Cluster) -> tuple[float, float]:
    """Bytes that leave a rank, and seconds, of summing the gradients of a step.

    Args:
        dense: Parameters that all ranks hold.
        experts: Parameters of a rank's experts, which the ranks of its column hold too.
    """
    num_bytes = seconds = 0.0
    for parameters, ranks in ((dense, range(mesh.world)), (experts, mesh.column(0))):
        if parameters and len(ranks) > 1:
            buffer = GRADIENT_BYTES * parameters
            num_bytes += 2 * (len(ranks) - 1) / len(ranks) * buffer
            seconds += _all_reduce_seconds(buffer, ranks, cluster)
    return num_bytes, seconds


def _all_to_all_seconds(buffer: float, mesh: Mesh, cluster: Cluster) -> float:
    """One equal-split exchange of a whole buffer, for the rank with most peers outside."""
    outside = max(
        mesh.expert - min(Counter(peer // cluster.island for peer in mesh.row(first)).values())
        for first in range(0, mesh.world, mesh.expert)
    )
    inside = mesh.expert - 1 - outside
    pair, numbers = buffer / mesh.expert, cluster.numbers
    latency = numbers.slow_latency_seconds if outside else numbers.fast_latency_seconds
    return latency + max(
        inside * pair / (numbers.exchange_share * numbers.fast_bytes_per_second),
        outside * pair / (numbers.exchange_share * numbers.slow_bytes_per_second),
    )


def _all_reduce_seconds(buffer: float, ranks: Sequence[int], cluster: Cluster) -> float:
    """Rings inside islands and across them; the ranks of an island share what crosses."""
    numbers = cluster.numbers
    islands = Counter(rank // cluster.island for rank in ranks)
    together, apart = min(islands.values()), len(islands)
    fast = 2 * (together - 1) / together * buffer / numbers.fast_bytes_per_second
    slow = 2 * (apart - 1) / apart * buffer / together / numbers.slow_bytes_per_second
    latency = numbers.slow_latency_seconds if apart > 1 else numbers.fast_latency_seconds
    buckets = -(-int(buffer) // BUCKET_BYTES)
    return buckets * latency + max(fast, slow) / numbers.reduction_share
